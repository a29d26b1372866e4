import math

import torch

from rlhf.maths.masking import masked_sum, whiten, whitening_sums

NAN = math.nan
VALUES = torch.tensor([[1.0, 5.0, NAN], [3.0, NAN, math.inf]])
MASK = torch.tensor([[True, True, False], [True, False, False]])
NOTHING = torch.zeros(2, 3, dtype=torch.bool)


def random_batch(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = 3 + 2 * torch.randn(6, 9, generator=generator)
    lengths = torch.randint(0, 10, (6,), generator=generator)
    return values, torch.arange(9) < lengths[:, None]


def test_sum_by_hand() -> None:
    assert masked_sum(VALUES, MASK).item() == 9.0


def test_nothing_counts() -> None:
    assert masked_sum(VALUES, NOTHING).item() == 0.0
    assert not whiten(VALUES, NOTHING).any()


def test_gradient_of_the_sum() -> None:
    values = torch.tensor([[1.0, NAN], [3.0, NAN]], requires_grad=True)
    masked_sum(values, torch.tensor([[True, False], [True, False]])).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_whiten_by_hand() -> None:
    # Values 1, 5, 3: mean 3, biased variance 8/3.
    deviation = (8 / 3) ** 0.5
    expected = torch.tensor([[-2 / deviation, 2 / deviation, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(whiten(VALUES, MASK), expected, rtol=0, atol=1e-6)


def test_whitened_tokens_have_mean_0_and_variance_1() -> None:
    values, mask = random_batch(0)
    whitened = whiten(values, mask)
    kept = whitened[mask]
    assert abs(kept.mean().item()) < 1e-5
    assert abs(kept.var(unbiased=False).item() - 1) < 1e-5
    assert not whitened[~mask].any()
    assert not torch.equal(mask, torch.ones_like(mask))


def test_shards_whiten_like_the_whole() -> None:
    values, mask = random_batch(1)
    shards = [slice(0, 1), slice(1, 4), slice(4, 6)]
    sums = torch.stack([whitening_sums(values[s], mask[s]) for s in shards]).sum(0)
    torch.testing.assert_close(sums, whitening_sums(values, mask))
    parts = torch.cat([whiten(values[s], mask[s], sums) for s in shards])
    torch.testing.assert_close(parts, whiten(values, mask), rtol=0, atol=1e-6)
    alone = torch.cat([whiten(values[s], mask[s]) for s in shards])
    assert (alone - parts).abs().max() > 0.01


def test_sums_by_hand() -> None:
    assert whitening_sums(VALUES, MASK).tolist() == [3.0, 9.0, 35.0]


def test_equal_values_become_zero() -> None:
    values = torch.full((2, 4), 1000.1)
    whitened = whiten(values, torch.ones(2, 4, dtype=torch.bool))
    assert whitened.abs().max() < 1e-3


def test_a_large_mean_does_not_swallow_the_spread() -> None:
    values = torch.tensor([[10000.0, 10001.0, 10002.0]])
    expected = torch.tensor([[-(1.5**0.5), 0.0, 1.5**0.5]])
    whitened = whiten(values, torch.ones(1, 3, dtype=torch.bool))
    torch.testing.assert_close(whitened, expected, rtol=0, atol=1e-5)
