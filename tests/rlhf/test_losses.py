import math
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf.losses import policy_loss, preference_pairs, ranking_loss, value_loss

NAN = math.nan


# Ranking loss ------------------------------------------------------------------------------------


def test_one_pair_by_hand() -> None:
    scores = torch.tensor([1.0, 3.0])
    loss, stats = ranking_loss(scores, torch.tensor([1, 2]), torch.tensor([0, 0]), num_prompts=1)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(2)), abs=1e-6)
    assert {name: value.item() for name, value in stats.items()} == {
        "pairs": 1,
        "correct": 0,
        "margin": -2,
    }


def test_untrained_scores_cost_log_2_whatever_k() -> None:
    ranks = torch.tensor([1, 2, 1, 2, 3, 4])
    trees = torch.tensor([0, 0, 1, 1, 1, 1])
    loss, stats = ranking_loss(torch.zeros(6), ranks, trees, num_prompts=2)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert stats["pairs"].item() == 7
    assert stats["correct"].item() == 3.5


def naive_ranking_loss(
    scores: Tensor, ranks: list[list[int | None]]
) -> tuple[Tensor, dict[str, float]]:
    """One pair after another, in double precision."""
    loss = torch.zeros((), dtype=torch.float64)
    stats = {"pairs": 0.0, "correct": 0.0, "margin": 0.0}
    start = prompts = 0
    for of_prompt in ranks:
        terms = []
        for i, j in combinations(range(len(of_prompt)), 2):
            a, b = of_prompt[i], of_prompt[j]
            if a is None or b is None or a == b:
                continue
            better, worse = (i, j) if a < b else (j, i)
            margin = scores[start + better].double() - scores[start + worse].double()
            terms.append(torch.nn.functional.softplus(-margin))
            stats["pairs"] += 1
            stats["margin"] += margin.item()
            stats["correct"] += 0.5 if margin.item() == 0 else float(margin.item() > 0)
        if terms:
            loss = loss + torch.stack(terms).mean()
            prompts += 1
        start += len(of_prompt)
    return loss / max(prompts, 1), stats


RANKS = st.lists(
    st.lists(st.none() | st.integers(1, 4), min_size=1, max_size=9), min_size=1, max_size=5
)


@settings(max_examples=100, deadline=None)
@given(ranks=RANKS, seed=st.integers(0, 99))
def test_ranking_loss_equals_a_loop_over_pairs(ranks: list[list[int | None]], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    num_responses = sum(map(len, ranks))
    scores = torch.randint(-4, 5, (num_responses,), generator=generator) / 2
    scores.requires_grad_()
    tree_index = torch.tensor([tree for tree, row in enumerate(ranks) for _ in row])
    order = torch.randperm(num_responses, generator=generator)

    expected, expected_stats = naive_ranking_loss(scores, ranks)
    flat = torch.tensor([rank or 0 for row in ranks for rank in row])
    num_prompts = sum(len({rank for rank in row if rank}) > 1 for row in ranks)
    loss, stats = ranking_loss(
        scores[order], flat[order], tree_index[order], num_prompts=max(num_prompts, 1)
    )
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    for name, value in expected_stats.items():
        assert stats[name].item() == pytest.approx(value, abs=1e-4)
    (gradient,) = torch.autograd.grad(loss, scores)
    if num_prompts:
        (expected_gradient,) = torch.autograd.grad(expected, scores)
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)
    else:
        assert not gradient.any()


def test_ranking_loss_of_parts_adds_up_to_the_whole() -> None:
    scores = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.2])
    ranks, trees = torch.tensor([2, 1, 1, 3, 2]), torch.tensor([7, 7, 9, 9, 9])
    whole, _ = ranking_loss(scores, ranks, trees, num_prompts=2)
    parts = [
        ranking_loss(scores[part], ranks[part], trees[part], num_prompts=2)[0]
        for part in (slice(0, 2), slice(2, 5))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=0, atol=1e-6)


def test_pairs_by_hand() -> None:
    ranks, trees = torch.tensor([2, 1, 0, 2, 1]), torch.tensor([0, 0, 0, 0, 1])
    pairs = preference_pairs(ranks, trees).nonzero().tolist()
    assert pairs == [[1, 0], [1, 3]]


def test_score_of_an_unranked_response_changes_nothing() -> None:
    ranks, trees = torch.tensor([1, 0, 2]), torch.tensor([0, 0, 0])
    clean = torch.tensor([0.5, 0.0, 0.2], requires_grad=True)
    dirty = torch.tensor([0.5, NAN, 0.2], requires_grad=True)
    results = []
    for scores in (clean, dirty):
        loss, stats = ranking_loss(scores, ranks, trees, num_prompts=1)
        loss.backward()
        results.append((loss.detach(), scores.grad, stats))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


# Policy and value loss ---------------------------------------------------------------------------


def test_policy_loss_by_hand() -> None:
    """Ratios 1.5 and 0.5 under both signs of the advantage, with clip range 0.2."""
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
    assert stats["max_log_ratio"].item() == pytest.approx(math.log(2), abs=1e-6)


def test_value_loss_by_hand() -> None:
    """Clip 0.5 around the old value 1: the larger of both errors counts."""
    values = torch.tensor([[2.0, 2.0, 1.2]])
    old_values = torch.ones(1, 3)
    returns = torch.tensor([[3.0, 1.0, 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, stats = value_loss(values, old_values, returns, mask, value_clip_range=0.5, num_tokens=3)
    # max(1, 1.5^2), max(1, 0.5^2), 1.2^2
    assert loss.item() == pytest.approx(0.5 * (2.25 + 1.0 + 1.44) / 3, abs=1e-6)
    assert stats["value_clipped"].item() == 1
    assert stats["squared_error"].item() == pytest.approx(1 + 1 + 1.44, abs=1e-5)
    loss, stats = value_loss(values, old_values, returns, mask, value_clip_range=None, num_tokens=3)
    assert loss.item() == pytest.approx(0.5 * 3.44 / 3, abs=1e-6)
    assert stats["value_clipped"].item() == 0


LENGTHS = torch.tensor([1, 6, 0, 4])
MASK = torch.arange(6) < LENGTHS[:, None]


def random_batch(seed: int, num_tensors: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(num_tensors, 4, 6, generator=generator))


def slow_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            ratio = torch.exp(logprobs[row, t].double() - old_logprobs[row, t].double())
            advantage = advantages[row, t].double()
            bounded = torch.clip(ratio, 1 - clip_range, 1 + clip_range)
            total = total - torch.minimum(advantage * ratio, advantage * bounded)
    return total


def slow_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, value_clip_range: float
) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for row, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            value, old = values[row, t].double(), old_values[row, t].double()
            target = returns[row, t].double()
            bounded = torch.clip(value, old - value_clip_range, old + value_clip_range)
            total = total + torch.maximum((value - target) ** 2, (bounded - target) ** 2) / 2
    return total


@pytest.mark.parametrize("seed", range(5))
def test_policy_loss_equals_a_loop_over_tokens(seed: int) -> None:
    logprobs, old_logprobs, advantages = random_batch(seed, 3)
    logprobs = logprobs.requires_grad_()
    expected = slow_policy_loss(logprobs, old_logprobs, advantages, 0.3) / 11
    (expected_gradient,) = torch.autograd.grad(expected, logprobs)
    loss, _ = policy_loss(logprobs, old_logprobs, advantages, MASK, clip_range=0.3, num_tokens=11)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)
    assert gradient.any()


@pytest.mark.parametrize("seed", range(5))
def test_value_loss_equals_a_loop_over_tokens(seed: int) -> None:
    values, old_values, returns = random_batch(seed, 3)
    values = values.requires_grad_()
    expected = slow_value_loss(values, old_values, returns, 0.4) / 11
    (expected_gradient,) = torch.autograd.grad(expected, values)
    loss, stats = value_loss(values, old_values, returns, MASK, value_clip_range=0.4, num_tokens=11)
    (gradient,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)
    assert 0 < stats["value_clipped"].item() < 11


def test_first_pass_has_ratio_1_and_the_plain_policy_gradient() -> None:
    old_logprobs, advantages = random_batch(0, 2)
    logprobs = old_logprobs.clone().requires_grad_()
    loss, stats = policy_loss(
        logprobs, old_logprobs, advantages, MASK, clip_range=0.2, num_tokens=11
    )
    loss.backward()
    assert stats["ratio"].item() == 11
    assert stats["clipped"].item() == stats["approx_kl"].item() == 0
    assert stats["max_log_ratio"].item() == 0
    expected = (-advantages / 11) * MASK
    torch.testing.assert_close(logprobs.grad, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rubbish", [NAN, math.inf, -1e30])
@pytest.mark.parametrize("loss_name", ["policy", "value", "value without clip"])
def test_what_stands_behind_the_end_changes_nothing(loss_name: str, rubbish: float) -> None:
    def loss_of(trained: Tensor, old: Tensor, target: Tensor) -> tuple:
        if loss_name == "policy":
            return policy_loss(trained, old, target, MASK, clip_range=0.2, num_tokens=11)
        clip = 0.4 if loss_name == "value" else None
        return value_loss(trained, old, target, MASK, value_clip_range=clip, num_tokens=11)

    results = []
    for behind in (0.0, rubbish):
        tensors = [tensor.masked_fill(~MASK, behind) for tensor in random_batch(3, 3)]
        trained = tensors[0].requires_grad_()
        loss, stats = loss_of(*tensors)
        loss.backward()
        results.append((loss.detach(), trained.grad, stats))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert not results[0][1][~MASK].any()


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
    tensors = [tensor.requires_grad_() for tensor in random_batch(5, 3)]
    _, policy_stats = policy_loss(*tensors, MASK, clip_range=0.2, num_tokens=11)
    _, value_stats = value_loss(*tensors, MASK, value_clip_range=0.2, num_tokens=11)
    scores = torch.zeros(2, requires_grad=True)
    _, ranking_stats = ranking_loss(
        scores, torch.tensor([1, 2]), torch.tensor([0, 0]), num_prompts=1
    )
    stats = [*policy_stats.values(), *value_stats.values(), *ranking_stats.values()]
    assert not any(value.requires_grad for value in stats)
