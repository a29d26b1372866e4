import math

import pytest
import torch

from rlhf.maths.kl import adapt_kl_coef, k1, k3, last_token_mask, penalized_rewards

NAN = math.nan
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, NAN, 9.0], [NAN, 9.0, NAN]])
REF_LOGPROBS = torch.tensor([[-1.5, -1.0, -0.5], [-1.0, 9.0, NAN], [9.0, NAN, NAN]])


def test_k1_by_hand() -> None:
    expected = torch.tensor([[0.5, -1.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(k1(LOGPROBS, REF_LOGPROBS, MASK), expected)


def test_k3_by_hand() -> None:
    expected = torch.tensor(
        [
            [math.exp(-0.5) - 1 + 0.5, math.e - 1 - 1, 0.0],
            [math.exp(2) - 1 - 2, 0.0, 0.0],
            [0.0, 0.0, 0.0],
        ]
    )
    torch.testing.assert_close(k3(LOGPROBS, REF_LOGPROBS, MASK), expected, rtol=0, atol=1e-6)


def test_both_estimators_are_unbiased() -> None:
    """Their mean over all tokens, weighted by the policy, is the KL summed over the vocabulary."""
    generator = torch.Generator().manual_seed(0)
    policy, ref_policy = torch.randn(2, 1, 50, generator=generator).log_softmax(-1)
    mask = torch.ones(1, 50, dtype=torch.bool)
    kl = torch.nn.functional.kl_div(ref_policy, policy, reduction="sum", log_target=True)
    assert kl > 0.1
    for estimator in (k1, k3):
        mean = (policy.exp() * estimator(policy, ref_policy, mask)).sum()
        torch.testing.assert_close(mean, kl, rtol=0, atol=1e-5)


def test_k3_is_not_negative() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 1000, generator=generator)
    for scale in (1e-3, 1.0, 20.0):
        logprobs = scale * noise
        mask = torch.ones_like(logprobs, dtype=torch.bool)
        assert k3(logprobs, torch.zeros_like(logprobs), mask).min() >= 0
        assert k1(logprobs, torch.zeros_like(logprobs), mask).min() < 0


def test_last_token() -> None:
    expected = torch.tensor([[False, False, True], [True, False, False], [False] * 3])
    assert torch.equal(last_token_mask(MASK), expected)


def test_rewards_by_hand() -> None:
    scores = torch.tensor([2.0, -1.0, NAN])
    rewards = penalized_rewards(scores, LOGPROBS, REF_LOGPROBS, MASK, kl_coef=0.1)
    expected = torch.tensor([[-0.05, 0.1, 2.0], [-0.8, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-6)


def test_rewards_sum_to_the_objective() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 4, 7, 3])
    mask = torch.arange(7) < lengths[:, None]
    logprobs, ref_logprobs = torch.randn(2, 4, 7, generator=generator)
    scores = torch.randn(4, generator=generator)
    rewards = penalized_rewards(scores, logprobs, ref_logprobs, mask, kl_coef=0.3)
    for response, length in enumerate(lengths):
        log_ratio = (logprobs - ref_logprobs)[response, :length].sum()
        objective = float(scores[response] - 0.3 * log_ratio)
        assert float(rewards[response].sum()) == pytest.approx(objective, abs=1e-5)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.15),  # on target
        (6.6, 0.15 * (1 + 0.1 * 512 / 10_000)),  # 10 % above
        (60.0, 0.15 * (1 + 0.2 * 512 / 10_000)),  # far above: no more than 20 %
        (3.0, 0.15 * (1 - 0.2 * 512 / 10_000)),  # half of the target
        (-1.0, 0.15 * (1 - 0.2 * 512 / 10_000)),  # an estimate below 0
    ],
)
def test_adapted_kl_coef_by_hand(kl: float, expected: float) -> None:
    found = adapt_kl_coef(0.15, kl, target=6.0, num_episodes=512, horizon=10_000)
    assert found == pytest.approx(expected, rel=1e-12)
