"""No function of a batch depends on values after the end, or on the order of rows."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.maths.advantages import generalized_advantages
from rlhf.maths.kl import k1, k3, penalized_rewards
from rlhf.maths.losses import policy_loss, value_loss
from rlhf.maths.masking import masked_sum, whiten, whitening_sums

Function = Callable[..., tuple[Tensor, ...]]
"""Takes three (batch, time) tensors, scores (batch,) and response_mask; returns results."""


def policy(a: Tensor, b: Tensor, c: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    loss, stats = policy_loss(a, b, c, mask, clip_range=0.2, num_tokens=7)
    return loss, *stats.values()


def value(a: Tensor, b: Tensor, c: Tensor, scores: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    loss, stats = value_loss(a, b, c, mask, value_clip_range=0.4, num_tokens=7)
    return loss, *stats.values()


def value_without_clip(
    a: Tensor, b: Tensor, c: Tensor, scores: Tensor, mask: Tensor
) -> tuple[Tensor, ...]:
    loss, stats = value_loss(a, b, c, mask, value_clip_range=None, num_tokens=7)
    return loss, *stats.values()


SUMS: dict[str, Function] = {
    "policy_loss": policy,
    "value_loss": value,
    "value_loss without clip": value_without_clip,
    "masked_sum": lambda a, b, c, scores, mask: (masked_sum(a, mask),),
    "whitening_sums": lambda a, b, c, scores, mask: (whitening_sums(a, mask),),
}
"""Functions whose results are sums over all rows."""

ROWS: dict[str, Function] = {
    "k1": lambda a, b, c, scores, mask: (k1(a, b, mask),),
    "k3": lambda a, b, c, scores, mask: (k3(a, b, mask),),
    "penalized_rewards": lambda a, b, c, scores, mask: (
        penalized_rewards(scores, a, b, mask, kl_coef=0.3),
    ),
    "generalized_advantages": lambda a, b, c, scores, mask: generalized_advantages(
        a, b, mask, gamma=0.9, gae_lambda=0.8
    ),
}
"""Functions whose results have a row for every row, which depends on no other row."""

ALL = {**SUMS, **ROWS, "whiten": lambda a, b, c, scores, mask: (whiten(a, mask),)}

lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=5)


def batch_of(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return three random tensors as one (3, batch, time), scores (batch,), and the mask."""
    time = max(1, *lengths)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(time) < torch.tensor(lengths)[:, None]
    tensors = torch.randn(3, len(lengths), time, generator=generator)
    return tensors, torch.randn(len(lengths), generator=generator), mask


def results_and_gradient(
    function: Function, tensors: Tensor, scores: Tensor, mask: Tensor
) -> list[Tensor]:
    trained = tensors[0].clone().requires_grad_()
    results = function(trained, tensors[1], tensors[2], scores, mask)
    (gradient,) = torch.autograd.grad(results[0].sum(), trained)
    return [*(result.detach() for result in results), gradient]


def bits(tensor: Tensor) -> list[int]:
    """Return the bits, in which -0.0 differs from 0.0, and NaN equals itself."""
    return tensor.flatten().view(torch.uint8).tolist()


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=30, deadline=None)
@given(
    lengths=lengths_of_rows,
    rubbish=st.lists(
        st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30, 3.0]), min_size=3, max_size=3
    ),
    seed=st.integers(0, 99),
)
def test_what_comes_after_the_end_changes_no_bit(
    name: str, lengths: list[int], rubbish: list[float], seed: int
) -> None:
    tensors, scores, mask = batch_of(lengths, seed)
    clean = results_and_gradient(ALL[name], tensors.where(mask, 0.0), scores, mask)
    dirty_tensors = tensors.where(mask, torch.tensor(rubbish)[:, None, None])
    dirty = results_and_gradient(ALL[name], dirty_tensors, scores, mask)
    assert [bits(result) for result in dirty] == [bits(result) for result in clean]


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=30, deadline=None)
@given(lengths=lengths_of_rows, seed=st.integers(0, 99))
def test_the_order_of_rows_changes_nothing(name: str, lengths: list[int], seed: int) -> None:
    """Rows keep their bits; sums over rows change by rounding only, at most 1e-6 of their size."""
    tensors, scores, mask = batch_of(lengths, seed)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    results = results_and_gradient(ALL[name], tensors, scores, mask)
    permuted = results_and_gradient(ALL[name], tensors[:, order], scores[order], mask[order])
    expected = [result[order] if result.ndim == 2 else result for result in results]
    tolerance = 0.0 if name in ROWS else 1e-6
    for found, wanted in zip(permuted, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
