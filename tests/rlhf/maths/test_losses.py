import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.maths.losses import policy_loss, preferences_from_ranks, ranking_loss, value_loss

NAN = math.nan


# Ranking loss ------------------------------------------------------------------------------------


def hard_loss(
    scores: Tensor, ranks: Tensor, tree_index: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    preferences = preferences_from_ranks(ranks, tree_index)
    return ranking_loss(scores, preferences, tree_index, **options)


def test_one_pair_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0])
    loss, stats = hard_loss(scores, torch.tensor([1, 2]), torch.tensor([0, 0]), num_prompts=1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2)), abs=1e-6)
    assert {name: value.item() for name, value in stats.items()} == {
        "pairs": 1,
        "correct": 0,
        "margin": -2,
    }


def test_a_soft_pair_by_hand() -> None:
    """sigmoid(ln 3) is 3/4, so at a gap of ln 3 the loss for a label of 3/4 is its entropy."""
    scores = torch.tensor([math.log(3), 0.0], requires_grad=True)
    preferences, trees = torch.tensor([[0.0, 0.75], [0.25, 0.0]]), torch.tensor([0, 0])
    loss, stats = ranking_loss(scores, preferences, trees, num_prompts=1)
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert loss.item() == pytest.approx(entropy, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient.abs().max() < 1e-6
    assert (stats["pairs"].item(), stats["correct"].item()) == (1, 1)


def test_an_even_pair_counts_in_the_loss_and_in_no_accuracy() -> None:
    preferences = torch.zeros(3, 3)
    preferences[0, 1] = preferences[1, 0] = 0.5
    preferences[1, 2], preferences[2, 1] = 0.1, 0.9
    scores, trees = torch.tensor([0.0, 2.0, 2.0]), torch.tensor([0, 0, 0])
    loss, stats = ranking_loss(scores, preferences, trees, num_prompts=1)
    even = 0.5 * math.log(1 + math.exp(2)) + 0.5 * math.log(1 + math.exp(-2))
    assert loss.item() == pytest.approx((even + math.log(2)) / 2, abs=1e-6)
    assert {name: value.item() for name, value in stats.items()} == {
        "pairs": 1,
        "correct": 0.5,
        "margin": 0,
    }


def test_a_margin_by_hand() -> None:
    """Two ranks at half a point each make a margin of 1: scores 1 apart cost what equal ones do."""
    ranks, trees = torch.tensor([3, 1]), torch.tensor([0, 0])
    margins = 0.5 * (ranks[None, :] - ranks[:, None])
    options = {"num_prompts": 1, "margins": margins}
    loss, stats = hard_loss(torch.tensor([1.0, 2.0]), ranks, trees, **options)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert (stats["correct"].item(), stats["margin"].item()) == (1, 1)


def test_weights_by_hand() -> None:
    """Losses ln 2 and ln 4 (a gap of -ln 3) have weights 3 and 1, and mean (3 ln 2 + ln 4) / 4."""
    scores = torch.tensor([0.0, 0.0, 0.0, math.log(3)])
    ranks, trees = torch.tensor([1, 2, 1, 2]), torch.tensor([0, 0, 1, 1])
    weights = torch.tensor([3.0, 3.0, 1.0, 1.0])
    loss, _ = hard_loss(scores, ranks, trees, num_prompts=4.0, weights=weights)
    assert loss.item() == pytest.approx((3 * math.log(2) + math.log(4)) / 4, abs=1e-6)


def test_untrained_scores_cost_log_2_whatever_k() -> None:
    ranks = torch.tensor([1, 2, 1, 2, 3, 4])
    trees = torch.tensor([0, 0, 1, 1, 1, 1])
    loss, stats = hard_loss(torch.zeros(6), ranks, trees, num_prompts=2)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert stats["pairs"].item() == 7
    assert stats["correct"].item() == 3.5


@dataclass(frozen=True)
class Judged:
    """Holds a prompt's responses. Either ranks or probabilities say which are better."""

    scores: list[float]
    ranks: list[int | None]
    probabilities: dict[tuple[int, int], float]
    weight: float
    margin_per_rank: float

    def pairs(self) -> dict[tuple[int, int], float]:
        """Map each (i, j), with i below j, to the probability that i is better."""
        pairs = dict(self.probabilities)
        for i, j in combinations(range(len(self.ranks)), 2):
            a, b = self.ranks[i], self.ranks[j]
            if a is not None and b is not None and a != b:
                pairs[i, j] = float(a < b)
        return pairs

    def margin(self, i: int, j: int) -> float:
        a, b = self.ranks[i], self.ranks[j]
        return 0.0 if a is None or b is None else self.margin_per_rank * (b - a)


def loop_over_pairs(batch: Sequence[Judged]) -> tuple[float, list[list[float]], dict[str, float]]:
    """Return loss, its slope for each score, and stats, pair by pair in Python's numbers."""
    total_weight = sum(one.weight for one in batch if one.pairs())
    loss, slopes = 0.0, [[0.0] * len(one.scores) for one in batch]
    stats = {"pairs": 0.0, "correct": 0.0, "margin": 0.0}
    for one, slope in zip(batch, slopes, strict=True):
        pairs = one.pairs()
        for (i, j), p in pairs.items():
            share = one.weight / len(pairs) / total_weight
            gap = one.scores[i] - one.scores[j]
            for better, worse, q in ((i, j, p), (j, i, 1 - p)):
                surplus = one.scores[better] - one.scores[worse] - one.margin(better, worse)
                loss += share * q * math.log1p(math.exp(-surplus))
                slope[better] -= share * q / (1 + math.exp(surplus))
                slope[worse] += share * q / (1 + math.exp(surplus))
            if p != 0.5:
                gap_of_likelier = gap if p > 0.5 else -gap
                stats["pairs"] += 1
                stats["margin"] += gap_of_likelier
                stats["correct"] += 0.5 if gap == 0 else float(gap_of_likelier > 0)
    return loss, slopes, stats


@st.composite
def judged(draw: st.DrawFn, margin_per_rank: float, same_weight: bool) -> Judged:
    num = draw(st.integers(2, 16))
    ranks: list[int | None] = [None] * num
    probabilities = {}
    if draw(st.booleans()):
        ranks = draw(st.lists(st.none() | st.integers(1, 5), min_size=num, max_size=num))
    else:
        possible = st.sampled_from(list(combinations(range(num), 2)))
        for pair in draw(st.sets(possible, max_size=12)):
            probabilities[pair] = draw(st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1))
    return Judged(
        scores=[x / 2 for x in draw(st.lists(st.integers(-6, 6), min_size=num, max_size=num))],
        ranks=ranks,
        probabilities=probabilities,
        weight=1.0 if same_weight else draw(st.floats(0.1, 10)),
        margin_per_rank=margin_per_rank,
    )


@st.composite
def batches(draw: st.DrawFn) -> list[Judged]:
    options = (draw(st.sampled_from([0.0, 0.0, 0.7])), draw(st.booleans()))
    return draw(st.lists(judged(*options), min_size=1, max_size=4))


@settings(max_examples=150, deadline=None)
@given(batch=batches(), seed=st.integers(0, 99))
def test_ranking_loss_and_gradient_equal_a_loop_over_pairs(batch: list[Judged], seed: int) -> None:
    """Examples have hard and soft labels, ties, unranked responses, K from 2 to 16, any order."""
    trees = [tree for tree, one in enumerate(batch) for _ in one.scores]
    order = torch.randperm(len(trees), generator=torch.Generator().manual_seed(seed))
    tree_index = torch.tensor(trees)
    scores = torch.tensor([score for one in batch for score in one.scores], dtype=torch.float64)
    weights = torch.tensor([batch[tree].weight for tree in trees], dtype=torch.float64)
    ranks = torch.tensor([rank or 0 for one in batch for rank in one.ranks])
    preferences = preferences_from_ranks(ranks, tree_index).double()
    for tree, one in enumerate(batch):
        start = trees.index(tree)
        for (i, j), p in one.probabilities.items():
            preferences[start + i, start + j] = p
            preferences[start + j, start + i] = 1 - p
    total_weight = sum(one.weight for one in batch if one.pairs())
    margins = batch[0].margin_per_rank * (ranks[None, :] - ranks[:, None]).double()

    scores.requires_grad_()
    loss, stats = ranking_loss(
        scores[order],
        preferences[order][:, order],
        tree_index[order],
        num_prompts=total_weight or 1,
        weights=None if set(weights.tolist()) == {1.0} else weights[order],
        margins=margins[order][:, order] if batch[0].margin_per_rank else None,
    )
    (gradient,) = torch.autograd.grad(loss, scores)

    expected, slopes, expected_stats = loop_over_pairs(batch)
    assert loss.item() == pytest.approx(expected, rel=0, abs=1e-12)
    expected_gradient = torch.tensor(
        [slope for of_prompt in slopes for slope in of_prompt], dtype=torch.float64
    )
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)
    for name, value in expected_stats.items():
        assert stats[name].item() == pytest.approx(value, rel=0, abs=1e-9)


def test_ranking_loss_of_parts_adds_up_to_the_whole() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.2])
    ranks, trees = torch.tensor([2, 1, 1, 3, 2]), torch.tensor([7, 7, 9, 9, 9])
    weights = torch.tensor([0.5, 0.5, 2.0, 2.0, 2.0])
    whole, _ = hard_loss(scores, ranks, trees, num_prompts=2.5, weights=weights)
    parts = [
        hard_loss(scores[part], ranks[part], trees[part], num_prompts=2.5, weights=weights[part])[0]
        for part in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-6)


def test_preferences_of_ranks_by_hand() -> None:
    ranks, trees = torch.tensor([2, 1, 0, 2, 1]), torch.tensor([0, 0, 0, 0, 1])
    preferences = preferences_from_ranks(ranks, trees)
    assert preferences.nonzero().tolist() == [[1, 0], [1, 3]]
    assert preferences.sum() == 2


@pytest.mark.parametrize("rubbish", [NAN, math.inf, -1e30])
def test_score_of_an_unranked_response_changes_nothing(rubbish: float) -> None:
    ranks, trees = torch.tensor([1, 0, 2]), torch.tensor([0, 0, 0])
    clean = torch.tensor([0.5, 0.0, 0.2], requires_grad=True)
    dirty = torch.tensor([0.5, rubbish, 0.2], requires_grad=True)
    results = []
    for scores in (clean, dirty):
        loss, stats = hard_loss(scores, ranks, trees, num_prompts=1)
        loss.backward()
        results.append((loss.detach(), scores.grad, stats))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


# Policy and value loss ---------------------------------------------------------------------------


def test_policy_loss_by_hand() -> None:
    """Ratios are 1.5 and 0.5, each with both signs of the advantage; the clip range is 0.2."""
    ratio = torch.tensor([[1.5, 1.5, 0.5, 0.5, 1.1]])
    advantages = torch.tensor([[2.0, -2.0, 2.0, -2.0, 1.0]])
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss, stats = policy_loss(
        ratio.log() - 1, torch.full((1, 5), -1.0), advantages, mask, clip_range=0.2, num_tokens=10
    )
    # -2 * 1.2 clipped, +2 * 1.5, -2 * 0.5, +2 * 0.8 clipped, -1.1
    assert loss.item() == pytest.approx((-2.4 + 3.0 - 1.0 + 1.6 - 1.1) / 10, abs=1e-6)
    assert stats["clipped"].item() == 2
    assert stats["ratio"].item() == pytest.approx(5.1, abs=1e-5)
    approx_kl = 2 * (0.5 - math.log(1.5)) + 2 * (-0.5 - math.log(0.5)) + 0.1 - math.log(1.1)
    assert stats["approx_kl"].item() == pytest.approx(approx_kl, abs=1e-5)


def test_value_loss_by_hand() -> None:
    """Values are clipped to 0.5 around the old value 1; the larger of both errors counts."""
    values = torch.tensor([[2.0, 2.0, 1.2]])
    old_values = torch.ones(1, 3)
    returns = torch.tensor([[3.0, 1.0, 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, stats = value_loss(values, old_values, returns, mask, value_clip_range=0.5, num_tokens=3)
    # max(1, 1.5^2), max(1, 0.5^2), 1.2^2
    assert loss.item() == pytest.approx(0.5 * (2.25 + 1.0 + 1.44) / 3, abs=1e-6)
    assert stats["value_clipped"].item() == 1
    loss, stats = value_loss(values, old_values, returns, mask, value_clip_range=None, num_tokens=3)
    assert loss.item() == pytest.approx(0.5 * 3.44 / 3, abs=1e-6)
    assert stats["value_clipped"].item() == 0


LENGTHS = torch.tensor([1, 6, 0, 4])
MASK = torch.arange(6) < LENGTHS[:, None]


def random_batch(seed: int, num_tensors: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(num_tensors, 4, 6, generator=generator))


def policy_case(
    logprob: float, old_logprob: float, advantage: float, clip_range: float
) -> tuple[float, float]:
    """Return a token's loss and its slope in the log-probability, case by case."""
    ratio = math.exp(logprob - old_logprob)
    if advantage > 0 and ratio > 1 + clip_range:
        return -advantage * (1 + clip_range), 0.0
    if advantage < 0 and ratio < 1 - clip_range:
        return -advantage * (1 - clip_range), 0.0
    return -advantage * ratio, -advantage * ratio


def value_case(
    value: float, old_value: float, target: float, value_clip_range: float | None
) -> tuple[float, float]:
    """Return a token's loss and its slope in the value, case by case."""
    error = value - target
    if value_clip_range is not None and abs(value - old_value) > value_clip_range:
        bounded = old_value + math.copysign(value_clip_range, value - old_value)
        if abs(bounded - target) > abs(error):
            return (bounded - target) ** 2 / 2, 0.0
    return error**2 / 2, error


def token_by_token(
    case: Callable[..., tuple[float, float]], tensors: Sequence[Tensor], *options: Any
) -> tuple[float, Tensor, int]:
    """Return loss, slopes (batch, time) and the number of clipped tokens, in Python's numbers."""
    loss, slopes, num_clipped = 0.0, torch.zeros(MASK.shape, dtype=torch.float64), 0
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            term, slope = case(*(tensor[row, t].item() for tensor in tensors), *options)
            loss += term / 11
            slopes[row, t] = slope / 11
            num_clipped += slope == 0.0
    return loss, slopes, num_clipped


@pytest.mark.parametrize("seed", range(5))
def test_policy_loss_and_gradient_equal_the_cases_token_by_token(seed: int) -> None:
    tensors = [tensor.double() for tensor in random_batch(seed, 3)]
    expected, slopes, num_clipped = token_by_token(policy_case, tensors, 0.3)
    logprobs, old_logprobs, advantages = tensors
    logprobs.requires_grad_()
    loss, stats = policy_loss(
        logprobs, old_logprobs, advantages, MASK, clip_range=0.3, num_tokens=11
    )
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert loss.item() == pytest.approx(expected, rel=0, abs=1e-12)
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=1e-12)
    assert 0 < num_clipped < 11
    assert stats["clipped"].item() == num_clipped


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("value_clip_range", [0.4, None])
def test_value_loss_and_gradient_equal_the_cases_token_by_token(
    seed: int, value_clip_range: float | None
) -> None:
    tensors = [tensor.double() for tensor in random_batch(seed, 3)]
    expected, slopes, num_clipped = token_by_token(value_case, tensors, value_clip_range)
    values, old_values, returns = tensors
    values.requires_grad_()
    loss, stats = value_loss(
        values, old_values, returns, MASK, value_clip_range=value_clip_range, num_tokens=11
    )
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == pytest.approx(expected, rel=0, abs=1e-12)
    torch.testing.assert_close(gradient, slopes, rtol=0, atol=1e-12)
    assert (0 < num_clipped < 11) == (value_clip_range is not None)
    assert stats["value_clipped"].item() == num_clipped


def test_a_log_ratio_beyond_20_is_cut_and_teaches_nothing() -> None:
    logprobs = torch.tensor([[0.0, -800.0]], requires_grad=True)
    old_logprobs, advantages = torch.tensor([[-800.0, 0.0]]), torch.tensor([[-1.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, old_logprobs, advantages, mask, clip_range=0.2, num_tokens=1)
    assert loss.item() == pytest.approx(math.exp(20), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [[0.0, 0.0]]


def test_first_pass_has_ratio_1_and_the_plain_policy_gradient() -> None:
    old_logprobs, advantages = random_batch(0, 2)
    logprobs = old_logprobs.clone().requires_grad_()
    loss, stats = policy_loss(
        logprobs, old_logprobs, advantages, MASK, clip_range=0.2, num_tokens=11
    )
    loss.backward()
    assert stats["ratio"].item() == 11
    assert stats["clipped"].item() == stats["approx_kl"].item() == 0
    expected = (-advantages / 11) * MASK
    torch.testing.assert_close(logprobs.grad, expected, rtol=0, atol=1e-6)


def test_losses_of_micro_batches_add_up_to_the_whole() -> None:
    tensors = random_batch(4, 3)

    def policy_part(rows: slice) -> Tensor:
        a, b, c = (tensor[rows] for tensor in tensors)
        return policy_loss(a, b, c, MASK[rows], clip_range=0.2, num_tokens=11)[0]

    def value_part(rows: slice) -> Tensor:
        a, b, c = (tensor[rows] for tensor in tensors)
        return value_loss(a, b, c, MASK[rows], value_clip_range=0.2, num_tokens=11)[0]

    for part in (policy_part, value_part):
        parts = part(slice(0, 1)) + part(slice(1, 4))
        torch.testing.assert_close(parts, part(slice(0, 4)), rtol=0, atol=1e-6)


def test_stats_carry_no_gradient() -> None:
    a, b, c = (tensor.requires_grad_() for tensor in random_batch(5, 3))
    _, policy_stats = policy_loss(a, b, c, MASK, clip_range=0.2, num_tokens=11)
    _, value_stats = value_loss(a, b, c, MASK, value_clip_range=0.2, num_tokens=11)
    scores = torch.zeros(2, requires_grad=True)
    _, ranking_stats = hard_loss(scores, torch.tensor([1, 2]), torch.tensor([0, 0]), num_prompts=1)
    stats = [*policy_stats.values(), *value_stats.values(), *ranking_stats.values()]
    assert not any(value.requires_grad for value in stats)
