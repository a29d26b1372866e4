"""Compares intervals with numbers worked by hand or taken from tables."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pytest

from rlhf.measuring.statistics import (
    FEW_CLUSTERS,
    Z_975,
    aggregate_difference,
    aggregate_estimate,
    best_of_n,
    best_of_n_kl,
    bootstrap_interval,
    difference_at_equal_length,
    distinct_bigrams,
    is_one_answer,
    majority_of_k,
    mean_and_error,
    most_frequent_answer,
    paired_difference,
    share_interval,
    t_interval,
    wilson_interval,
    win_rate,
)


def test_bootstrap_of_two_clusters_reaches_each_of_them() -> None:
    # One draw in four takes cluster 1 twice, and one in four takes cluster 2 twice.
    assert bootstrap_interval([[1.0, 1.0], [4.0]], seed=0) == (1.0, 4.0)


def test_bootstrap_agrees_with_the_normal_interval_of_many_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=400)
    low, high = bootstrap_interval([[value] for value in values], seed=0)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_bootstrap_is_over_clusters_so_repeats_add_no_certainty() -> None:
    values = np.random.default_rng(2).normal(size=50)
    once = bootstrap_interval([[value] for value in values], seed=3)
    tenfold = bootstrap_interval([[value] * 10 for value in values], seed=3)
    assert tenfold == pytest.approx(once, abs=1e-12)


def test_bootstrap_weighs_values_not_clusters() -> None:
    # 50 clusters of nine zeros and 50 of a single one: the mean of all values is 0.1.
    low, high = bootstrap_interval([[0.0] * 9] * 50 + [[1.0]] * 50, seed=0)
    assert 0.05 < low < 0.1 < high < 0.2


def test_bootstrap_repeats_with_its_seed_and_tells_nothing_of_one_cluster() -> None:
    clusters = [[0.0, 1.0], [1.0], [0.5, 0.5], []]
    assert bootstrap_interval(clusters, seed=5) == bootstrap_interval(clusters, seed=5)
    assert all(math.isnan(end) for end in bootstrap_interval([[1.0, 2.0], []], seed=5))


def test_win_rate_counts_ties_half_and_every_pair_of_a_prompt() -> None:
    # Prompt 1 has a win (2 > 1) and a tie (2 = 2), prompt 2 a loss (0 < 1): (1 + 0.5 + 0) / 3.
    found = win_rate([[2.0], [0.0]], [[1.0, 2.0], [1.0]])
    assert found.value == pytest.approx(0.5, abs=1e-12)
    # a bootstrap over two prompts would give (0, 0.75)
    assert found.interval == (0.0, wilson_interval(0.5, 2)[1])


def test_win_rate_against_itself_is_half() -> None:
    scores = [[1.0, 2.0, 3.0], [0.0, 0.0], [5.0]]
    assert win_rate(scores, scores).value == 0.5


def test_win_rate_refuses_different_prompts_and_nothing() -> None:
    with pytest.raises(ValueError, match="2 prompts against 1"):
        win_rate([[1.0], [1.0]], [[1.0]])
    with pytest.raises(ValueError, match="no pair"):
        win_rate([], [])


def test_mean_and_standard_error() -> None:
    mean, error = mean_and_error([1.0, 2.0, 3.0, 4.0])
    assert mean == 2.5
    assert error == pytest.approx(math.sqrt(5 / 3) / 2, abs=1e-12)
    assert math.isnan(mean_and_error([1.0])[1])


def test_t_interval_of_three_seeds() -> None:
    # Mean 4, standard deviation 2, so 4.3027 * 2 / sqrt(3) on either side.
    value, (low, high) = t_interval([2.0, 4.0, 6.0])
    assert value == 4.0
    assert (low, high) == pytest.approx((4 - 4.96833, 4 + 4.96833), abs=1e-4)


def test_t_interval_of_one_value_is_unknown_and_of_none_refused() -> None:
    value, interval = t_interval([2.0])
    assert value == 2.0
    assert all(map(math.isnan, interval))
    with pytest.raises(ValueError, match="no values"):
        t_interval([])


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("proxy", [[3, 1, 2, 7, 5, 6, 4], [1, 0, 1, 2, 2, 0, 2], [1] * 7])
def test_best_of_n_is_the_mean_over_all_subsets(n: int, proxy: list[float]) -> None:
    gold = [0.3, -1.0, 2.5, 0.0, 4.0, -0.7, 1.1]
    winners = []
    for subset in combinations(range(7), n):
        best = max(proxy[i] for i in subset)
        tied = [gold[i] for i in subset if proxy[i] == best]
        winners.append(sum(tied) / len(tied))
    expected = sum(winners) / len(winners)
    assert best_of_n(proxy, gold, n) == pytest.approx(expected, abs=1e-12)


def test_best_of_n_refuses_more_than_there_are_samples() -> None:
    with pytest.raises(ValueError, match="n is 3, with 2 samples; give 1 to 2"):
        best_of_n([0.0, 1.0], [0.0, 1.0], 3)


@pytest.mark.parametrize(("n", "nats"), [(1, 0.0), (2, 0.193147), (4, 0.636294), (64, 3.174508)])
def test_best_of_n_kl(n: int, nats: float) -> None:
    assert best_of_n_kl(n) == pytest.approx(nats, abs=1e-6)


def test_best_of_n_kl_bounds_that_of_a_coin() -> None:
    # Best of 2 fair coins is heads in 3 of 4 cases.
    exact = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert 0 < exact < best_of_n_kl(2)


def test_distinct_bigrams_by_hand() -> None:
    assert distinct_bigrams([[1, 2, 1, 2], [1, 0]]) == 3 / 4  # bigrams 12, 21, 12, 10
    assert distinct_bigrams([[1], [2], []]) == 0.0


def test_wilson_interval_worked_by_hand() -> None:
    """10 of 10: 1 / (1 + 3.8415 / 10). 5 of 10: 0.5 -+ 1.96 sqrt(0.025 + 0.0096) / 1.384."""
    assert wilson_interval(1.0, 10) == pytest.approx((0.722467, 1.0), abs=1e-6)
    assert wilson_interval(0.5, 10) == pytest.approx((0.236593, 0.763407), abs=1e-5)


def test_few_prompts_that_agree_prove_little() -> None:
    """A coin is right about two of two one time in four."""
    low, high = share_interval([[1.0, 1.0, 1.0], [1.0]], seed=0)
    assert low == pytest.approx(1 / (1 + Z_975**2 / 2)) and high == 1.0
    many = [[float(i % 3 > 0)] for i in range(FEW_CLUSTERS)]
    assert share_interval(many, seed=0) == bootstrap_interval(many, seed=0)
    assert all(map(math.isnan, share_interval([[1.0]], seed=0)))


def test_paired_difference_by_hand() -> None:
    # The prompts' means differ by 2 - 1, 0 - 1 and 4 - 0; the fourth prompt has no value of b.
    value, (low, high) = paired_difference([[1, 3], [0], [4], [9]], [[1], [0, 2], [0], []])
    assert value == pytest.approx(4 / 3)
    assert -1.0 <= low < value < high <= 4.0
    assert all(map(math.isnan, [*paired_difference([[]], [[1]])[1]]))


def test_a_difference_at_equal_length_by_hand() -> None:
    """Prompts differ by (length, value) of (-2, 3), (0, 1), (2, 2): the line is 2 - length / 4."""
    b = [[1.0], [1.0], [1.0]]
    found = difference_at_equal_length([[4], [2], [3]], b, [[1], [3], [6, 4]], [[3], [3], [3]])
    assert found.value == pytest.approx(2.0)
    found = difference_at_equal_length([[4], [2]], b[:2], [[4], [5]], [[3], [3]])
    assert found.value == pytest.approx(5.0)  # (1, 3) and (2, 1)
    level = difference_at_equal_length([[4], [2]], b[:2], [[3], [4]], [[3], [4]])
    assert level.value == pytest.approx(2.0)
    shorter = difference_at_equal_length([[4], [2]], b[:2], [[1], [2]], [[3], [4]])
    assert math.isnan(shorter.value)


def test_a_gain_that_comes_with_length_is_none_at_equal_length() -> None:
    random = np.random.default_rng(0)
    longer = random.normal(8.0, 6.0, size=300)
    noise = random.normal(size=300)
    zeros = [[0.0]] * 300
    lengths = [[value] for value in longer]
    by_length = [[value] for value in 0.1 * longer + noise]
    found = difference_at_equal_length(by_length, zeros, lengths, zeros)
    assert found.interval[0] < 0 < found.interval[1] and abs(found.value) < 0.2
    half_width = 1.96 * np.sqrt((1 + (longer.mean() / longer.std()) ** 2) / 300)
    assert found.interval[1] - found.value == pytest.approx(half_width, rel=0.15)
    real = [[value] for value in 0.1 * longer + 0.5 + noise]
    found = difference_at_equal_length(real, zeros, lengths, zeros)
    assert found.value == pytest.approx(0.5, abs=0.2) and found.interval[0] > 0


def test_pairing_takes_out_what_the_prompts_share() -> None:
    level = np.random.default_rng(0).normal(size=100) * 10
    value, (low, high) = paired_difference([[x + 0.5] for x in level], [[x] for x in level])
    assert value == pytest.approx(0.5)
    assert low == pytest.approx(0.5) and high == pytest.approx(0.5)


def test_the_most_frequent_answer_by_hand() -> None:
    # "yes": 1/2 + 0 + 1 of three prompts; "no": 1/2 + 2/3; "well": 1/3.
    answers = [["yes", "no"], ["no", "no", "well"], ["yes"]]
    assert most_frequent_answer(answers) == ("yes", pytest.approx(0.5))
    assert most_frequent_answer([["b"], ["a"]]) == ("b", 0.5)  # of equals the first counts


@pytest.mark.parametrize(
    ("share", "before", "expected"),
    [
        (0.4, 0.02, True),
        (0.09, 0.01, False),  # few prompts
        (0.24, 0.1, False),  # odds rise from 1/9 to 0.316, less than threefold
        (0.26, 0.1, True),  # odds rise from 1/9 to 0.351
        (0.74, 0.5, False),  # odds rise from 1 to 2.85, as for yes and no
        (0.76, 0.5, True),
        (1.0, 0.9, True),
        (1.0, 1.0, False),
    ],
)
def test_one_answer_to_many_prompts(share: float, before: float, expected: bool) -> None:
    assert is_one_answer(share, before, max_share=0.1) is expected


@pytest.mark.parametrize(("k", "chance"), [(1, 2 / 4), (2, 4 / 6), (3, 3 / 4), (4, 1.0)])
def test_majority_by_hand(k: int, chance: float) -> None:
    # Of two answers, a and b are a tie, a and None give a, b and None give b, which is wrong.
    assert majority_of_k(["a", "b", "a", None], [1, 0, 1, 0], k) == pytest.approx(chance)


def test_majority_equals_the_mean_over_all_subsets() -> None:
    generator = np.random.default_rng(0)
    for _ in range(40):
        names = [None, "a", "b", "c", "d"]
        answers = [names[i] for i in generator.integers(5, size=7)]
        is_right = dict(zip(names, (0, *generator.integers(2, size=4)), strict=True))
        right = [is_right[answer] for answer in answers]
        for k in (1, 3, 4, 7):
            chances = [majority(subset, is_right) for subset in combinations(answers, k)]
            assert majority_of_k(answers, right, k) == pytest.approx(np.mean(chances))


def majority(answers: Sequence[str | None], is_right: Mapping[str | None, int]) -> float:
    """Return how right the most frequent answer is; equally frequent ones count alike."""
    voters = [answer for answer in answers if answer is not None]
    counts = {answer: voters.count(answer) for answer in voters}
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return sum(is_right[answer] for answer in winners) / len(winners) if winners else 0.0


def test_majority_refuses_more_voters_than_answers() -> None:
    with pytest.raises(ValueError, match="k is 3, with 2 answers"):
        majority_of_k(["a", "b"], [1, 0], 3)


def spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


def test_aggregate_of_two_clusters_by_hand() -> None:
    # One draw in two takes both clusters, whose spread is 5. One in four takes 6 alone: spread 0.
    estimate = aggregate_estimate([[1.0, 3.0], [6.0]], spread, seed=0)
    assert estimate.value == 5.0
    assert estimate.interval == (0.0, 5.0)


def test_aggregate_difference_draws_the_same_clusters() -> None:
    values = np.random.default_rng(2).normal(size=50).tolist()
    a, b = [[value] for value in values], [[value + 0.5] for value in values]
    estimate = aggregate_difference(a, b, lambda some: sum(some) / len(some), seed=0)
    assert (estimate.value, *estimate.interval) == pytest.approx((-0.5, -0.5, -0.5))
    with pytest.raises(ValueError, match="50 clusters against 49"):
        aggregate_difference(a, b[1:], spread, seed=0)


def test_aggregate_of_a_mean_agrees_with_the_bootstrap_of_means() -> None:
    clusters = [[float(i), float(i % 7)] for i in range(30)]
    estimate = aggregate_estimate(clusters, lambda some: sum(some) / len(some), seed=3)
    assert estimate.interval == pytest.approx(bootstrap_interval(clusters, seed=3))
