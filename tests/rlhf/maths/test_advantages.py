import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.maths.advantages import generalized_advantages


def test_three_tokens_by_hand() -> None:
    """From the end, with gamma 0.9, deltas are 2 - 1, 0 + 0.9 - 3 = -2.1 and 1 + 2.7 - 2 = 1.7."""
    rewards = torch.tensor([[1.0, 0.0, 2.0, math.nan]])
    values = torch.tensor([[2.0, 3.0, 1.0, math.nan]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = generalized_advantages(rewards, values, mask, gamma=0.9, gae_lambda=0.5)
    third, second = 1.0, -2.1 + 0.45 * 1.0
    first = 1.7 + 0.45 * second
    expected = torch.tensor([[first, second, third, 0.0]])
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-6)
    expected = torch.tensor([[first + 2, second + 3, third + 1, 0.0]])
    torch.testing.assert_close(returns, expected, rtol=0, atol=1e-6)


def sums_of_deltas(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Compute A_t = sum over l of (gamma lambda)^l delta_{t+l}, term by term, in fp64."""
    advantages = torch.zeros(rewards.shape, dtype=torch.float64)
    returns = torch.zeros(rewards.shape, dtype=torch.float64)
    for row, length in enumerate(lengths):
        value = [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            for later in range(t, length):
                delta = float(rewards[row, later]) + gamma * value[later + 1] - value[later]
                advantages[row, t] += (gamma * gae_lambda) ** (later - t) * delta
            returns[row, t] = advantages[row, t] + value[t]
    return advantages, returns


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    room=st.integers(0, 2),
    gamma=st.floats(0, 1),
    gae_lambda=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_equals_the_written_out_sum(
    lengths: list[int], room: int, gamma: float, gae_lambda: float, seed: int
) -> None:
    check(lengths, gamma, gae_lambda, seed, room)


@pytest.mark.parametrize(
    "lengths",
    [[7, 7, 7], [1, 1], [0, 3], [0], [1, 7, 4]],
    ids=["none ends", "first token ends", "an empty response", "only empty", "mixed"],
)
def test_equals_the_written_out_sum_at_the_edges(lengths: list[int]) -> None:
    check(lengths, 0.97, 0.9, seed=0)


def check(lengths: list[int], gamma: float, gae_lambda: float, seed: int, room: int = 0) -> None:
    """Compare both for responses of these lengths, with padding after the longest."""
    time = max(1, *lengths) + room
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), time, generator=generator)
    mask = torch.arange(time) < torch.tensor(lengths)[:, None]
    rewards[~mask], values[~mask] = math.nan, math.inf
    before = rewards.clone(), values.clone()
    advantages, returns = generalized_advantages(
        rewards, values, mask, gamma=gamma, gae_lambda=gae_lambda
    )
    expected = sums_of_deltas(rewards, values, lengths, gamma, gae_lambda)
    torch.testing.assert_close(advantages.double(), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns.double(), expected[1], rtol=1e-5, atol=1e-5)
    for argument, copy in zip((rewards, values), before, strict=True):
        torch.testing.assert_close(argument, copy, equal_nan=True)


def test_lambda_1_gives_the_sum_of_later_rewards() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    values = torch.tensor([[9.0, -5.0, 3.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    _, returns = generalized_advantages(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0]]), rtol=0, atol=1e-5)
