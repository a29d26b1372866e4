"""Computes accuracies, win rates and means with the intervals that stages and experiments report.

Samples of one prompt resemble each other, so they are not independent trials. If something is
measured several times per prompt, its interval comes from drawing whole prompts, not single values
(the cluster bootstrap, Davison and Hinkley 1997, section 3.8).
"""

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from scipy import stats

Z_975 = stats.norm.ppf(0.975)
"""Quantile 0.975 of the normal distribution."""

NUM_RESAMPLES = 2000
"""Number of sets of clusters that a bootstrap draws."""

MAX_VALUES_IN_MEMORY = 1_000_000
"""Maximum number of values that a bootstrap holds in memory at once."""

ONE_ANSWER_ODDS = 3.0
"""Factor by which the odds of one answer must grow to be suspicious."""


Value = TypeVar("Value")
FloatArray = npt.NDArray[np.float64]


class Estimate(NamedTuple):
    """A number and its 95 % interval."""

    value: float
    interval: tuple[float, float]


def bootstrap_interval(
    values_by_cluster: Sequence[Sequence[float]],
    seed: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, drawing clusters with replacement.

    Args:
        values_by_cluster: Values of each cluster, such as a prompt. Empty clusters are left out.
        seed: Seed of the draws; equal seeds give equal intervals.
        num_resamples: Number of sets of clusters that are drawn.

    Returns:
        (low, high); (nan, nan) for fewer than two clusters, which say nothing about their spread.
    """
    clusters = [cluster for cluster in values_by_cluster if len(cluster) > 0]
    if len(clusters) < 2:
        return math.nan, math.nan
    sums = np.array([math.fsum(cluster) for cluster in clusters])
    counts = np.array([len(cluster) for cluster in clusters])
    drawn = stats.bootstrap(
        (sums, counts),
        lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
        paired=True,
        n_resamples=num_resamples,
        batch=max(1, MAX_VALUES_IN_MEMORY // len(clusters)),
        method="percentile",
        rng=seed,
    )
    low, high = drawn.confidence_interval
    return float(low), float(high)


FEW_CLUSTERS = 20
"""Number of clusters from which `share_interval` trusts the bootstrap alone."""


def share_interval(values_by_cluster: Sequence[Sequence[float]], seed: int) -> tuple[float, float]:
    """Return the 95 % interval of a share: `bootstrap_interval`, wider if there are few clusters.

    A bootstrap cannot draw what no cluster showed, so two prompts that agree would give an interval
    of width 0. With fewer than FEW_CLUSTERS clusters, the interval therefore also covers Wilson's
    (1927) for that many trials.
    """
    low, high = bootstrap_interval(values_by_cluster, seed)
    clusters = [cluster for cluster in values_by_cluster if len(cluster) > 0]
    if not 2 <= len(clusters) < FEW_CLUSTERS:
        return low, high
    share = math.fsum(map(math.fsum, clusters)) / sum(map(len, clusters))
    least, most = wilson_interval(share, len(clusters))
    return min(low, least), max(high, most)


def wilson_interval(share: float, num_trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a probability, from a share of independent trials (Wilson
    1927)."""
    spread = Z_975**2 / num_trials
    centre = (share + spread / 2) / (1 + spread)
    half_width = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def win_rate(
    scores_a: Sequence[Sequence[float]], scores_b: Sequence[Sequence[float]], seed: int = 0
) -> Estimate:
    """Return how often a's response beats b's to the same prompt; a tie counts half.

    Args:
        scores_a: Scores of a's responses by prompt.
        scores_b: Scores of b's responses to the same prompts. Within a prompt, every response of a
            is compared with every one of b.
        seed: Seed of the bootstrap over prompts, which gives the interval.

    Raises:
        ValueError: The two have different prompts, or there are no responses.
    """
    if len(scores_a) != len(scores_b):
        raise ValueError(
            f"{len(scores_a)} prompts against {len(scores_b)}; a win rate needs the same ones"
        )
    by_prompt = [
        [float(a > b) + 0.5 * float(a == b) for a in of_a for b in of_b]
        for of_a, of_b in zip(scores_a, scores_b, strict=True)
    ]
    outcomes = [outcome for outcomes in by_prompt for outcome in outcomes]
    if not outcomes:
        raise ValueError("no pair of responses to compare; give at least one a prompt and policy")
    return Estimate(math.fsum(outcomes) / len(outcomes), share_interval(by_prompt, seed))


def paired_difference(
    values_a: Sequence[Sequence[float]], values_b: Sequence[Sequence[float]], seed: int = 0
) -> Estimate:
    """Return the mean over prompts of a's mean minus b's.

    Args:
        values_a: Values of a's responses by prompt.
        values_b: Values of b's, for the same prompts. Prompts for which either has none are left
            out.
        seed: Seed of the bootstrap over prompts, which gives the interval.

    Returns:
        (nan, (nan, nan)) if no prompt is left.
    """
    differences = _differences(values_a, values_b)
    if not differences:
        return Estimate(math.nan, (math.nan, math.nan))
    mean = math.fsum(differences) / len(differences)
    return Estimate(mean, bootstrap_interval([[one] for one in differences], seed))


def difference_at_equal_length(
    values_a: Sequence[Sequence[float]],
    values_b: Sequence[Sequence[float]],
    lengths_a: Sequence[Sequence[float]],
    lengths_b: Sequence[Sequence[float]],
    seed: int = 0,
) -> Estimate:
    """Return the `paired_difference` to expect if a's responses were as long as b's.

    It is the intercept of a least-squares regression over prompts, of the difference of values on
    the difference of lengths. Dubois et al. 2024 correct win rates for length in this way, with a
    logistic model.

    Args:
        values_a, values_b, seed: As in `paired_difference`.
        lengths_a, lengths_b: Lengths of the same responses.

    Returns:
        (nan, (nan, nan)) if fewer than two prompts are left, or if the difference of lengths is the
        same for all prompts and is not 0.
    """
    values = np.array(_differences(values_a, values_b))
    lengths = np.array(_differences(lengths_a, lengths_b))
    if len(values) < 2 or (np.ptp(lengths) == 0 and lengths[0] != 0):
        return Estimate(math.nan, (math.nan, math.nan))
    drawn = stats.bootstrap(
        (values, lengths),
        _intercept,
        paired=True,
        n_resamples=NUM_RESAMPLES,
        batch=max(1, MAX_VALUES_IN_MEMORY // len(values)),
        method="percentile",
        rng=seed,
    )
    low, high = drawn.confidence_interval
    return Estimate(float(_intercept(values, lengths, -1)), (float(low), float(high)))


def _differences(
    values_a: Sequence[Sequence[float]], values_b: Sequence[Sequence[float]]
) -> list[float]:
    """Return a's mean minus b's for each prompt for which both have values."""
    return [
        math.fsum(a) / len(a) - math.fsum(b) / len(b)
        for a, b in zip(values_a, values_b, strict=True)
        if a and b
    ]


def _intercept(values: FloatArray, lengths: FloatArray, axis: int) -> FloatArray:
    """Return the intercept of a least-squares line along the axis. If all lengths are equal, its
    slope is 0."""
    mean_value, mean_length = values.mean(axis, keepdims=True), lengths.mean(axis, keepdims=True)
    spread = np.square(lengths - mean_length).sum(axis)
    together = ((values - mean_value) * (lengths - mean_length)).sum(axis)
    slope = together / np.where(spread == 0, 1.0, spread)
    return np.asarray(mean_value.squeeze(axis) - slope * mean_length.squeeze(axis))


def aggregate_estimate(
    values_by_cluster: Sequence[Sequence[Value]],
    aggregate: Callable[[list[Value]], float],
    seed: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Return an aggregate of all values, such as a perplexity, with its 95 % percentile interval.

    Args:
        values_by_cluster: Values of each cluster, such as a question, which is drawn as a whole.
        aggregate: Makes one number of a list of values. For a mean, `bootstrap_interval` is faster.
        seed: Seed of the draws; equal seeds give equal intervals.
        num_resamples: Number of sets of clusters that are drawn.

    Returns:
        The interval is (nan, nan) for a single cluster.
    """

    def compute(clusters: Sequence[int]) -> float:
        return float(aggregate(_values_of(values_by_cluster, clusters)))

    return _bootstrap_clusters(compute, len(values_by_cluster), seed, num_resamples)


def aggregate_difference(
    values_a: Sequence[Sequence[Value]],
    values_b: Sequence[Sequence[Value]],
    aggregate: Callable[[list[Value]], float],
    seed: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> Estimate:
    """Return a's aggregate minus b's; every draw takes the same clusters of both.

    Args:
        values_a: Values of a by cluster.
        values_b: Values of b for the same clusters.
        aggregate, seed, num_resamples: As in `aggregate_estimate`.

    Raises:
        ValueError: The two have different numbers of clusters.
    """
    if len(values_a) != len(values_b):
        raise ValueError(
            f"{len(values_a)} clusters against {len(values_b)}; a paired difference needs the same"
        )

    def subtract(clusters: Sequence[int]) -> float:
        of_a, of_b = _values_of(values_a, clusters), _values_of(values_b, clusters)
        return float(aggregate(of_a) - aggregate(of_b))

    return _bootstrap_clusters(subtract, len(values_a), seed, num_resamples)


def _bootstrap_clusters(
    compute: Callable[[Sequence[int]], float], num_clusters: int, seed: int, num_resamples: int
) -> Estimate:
    """Return compute(numbers of all clusters), and its interval over draws of their numbers."""
    value = compute(range(num_clusters))
    if num_clusters < 2:
        return Estimate(value, (math.nan, math.nan))
    drawn = stats.bootstrap(
        (np.arange(num_clusters),),
        lambda clusters: compute(clusters.tolist()),
        vectorized=False,
        n_resamples=num_resamples,
        method="percentile",
        rng=seed,
    )
    low, high = drawn.confidence_interval
    return Estimate(value, (float(low), float(high)))


def _values_of(
    values_by_cluster: Sequence[Sequence[Value]], clusters: Iterable[int]
) -> list[Value]:
    return [value for cluster in clusters for value in values_by_cluster[cluster]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of independent values and its standard error; nan for fewer than two."""
    if not values:
        return math.nan, math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return math.fsum(values) / len(values), float(error)


def t_interval(values: Sequence[float]) -> Estimate:
    """Return the mean of a few independent values, such as one per seed, with its 95 % t interval.

    The interval is (nan, nan) for a single value.

    Raises:
        ValueError: There is no value.
    """
    if not values:
        raise ValueError("no values; give one for each seed")
    mean, error = mean_and_error(values)
    half_width = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return Estimate(mean, (mean - half_width, mean + half_width))


def best_of_n(proxy: Sequence[float], values: Sequence[float], n: int) -> float:
    """Return the expected value of the response with the best proxy score among n of these N.

        R_n = sum_{i=n..N} C(i-1, n-1) / C(N, n) * value(y_i),   y sorted by proxy, worst first

    This is an unbiased estimate of best-of-n from N >= n samples of one prompt: y_i is the best of
    C(i-1, n-1) of the C(N, n) subsets (Nakano et al. 2021, appendix I). Among responses with equal
    proxy scores the choice is random, so each counts with the mean of its group.

    Args:
        proxy: (N,) scores by which a response is chosen.
        values: (N,) values of the responses, such as gold scores, lengths or proxy scores.

    Raises:
        ValueError: n is not 1 to N.
    """
    proxies, wanted = np.asarray(proxy, dtype=float), np.asarray(values, dtype=float)
    num_samples = len(proxies)
    if not 1 <= n <= num_samples:
        raise ValueError(f"n is {n}, with {num_samples} samples; give 1 to {num_samples}")
    _, group = np.unique(proxies, return_inverse=True)
    group_means = np.bincount(group, weights=wanted) / np.bincount(group)
    subsets = math.comb(num_samples, n)
    weights = [math.comb(i - 1, n - 1) / subsets for i in range(1, num_samples + 1)]
    return float(np.dot(weights, group_means[np.sort(group)]))


def best_of_n_kl(n: int) -> float:
    """Return the KL of best-of-n from its policy, ln n - (n-1)/n nats (Stiennon et al. 2020, G.3).

    It is exact if no two responses have the same score. For a policy with few different responses
    it is an upper bound (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


def majority_of_k(answers: Sequence[str | None], right: Sequence[float], k: int) -> float:
    """Return the probability that the majority of k of these N answers is right (maj@k).

    It is the mean over all C(N, k) subsets, so it is unbiased for every k up to N. The answer that
    most of a subset give wins (Wang et al. 2022, self-consistency); tied ones share the win. The
    subsets are counted, not listed: for each number j of votes for the winner, a sum over the
    different answers builds up the subsets of k in which no answer has more than j votes.

    Args:
        answers: (N,) answers to one question. None is no answer: it takes a place in a subset, but
            does not vote. A subset of None alone is wrong.
        right: (N,) 1 for a right answer, 0 for a wrong one; equal answers have the same.
        k: Size of the subsets.

    Raises:
        ValueError: k is not 1 to N.
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"k is {k}, with {len(answers)} answers; give 1 to {len(answers)}")
    counts: dict[str, int] = {}
    values: dict[str, float] = {}
    for answer, value in zip(answers, right, strict=True):
        if answer is not None:
            counts[answer] = counts.get(answer, 0) + 1
            values[answer] = float(value)
    silent = len(answers) - sum(counts.values())
    wins = 0.0
    for most_votes in range(1, k + 1):
        # Maps (size, number of winners) to the number of subsets and the sum of winners' values.
        subsets = {(size, 0): (math.comb(silent, size), 0.0) for size in range(min(silent, k) + 1)}
        for answer, count in counts.items():
            subsets = _with_answer(subsets, count, values[answer], most_votes, k)
        for (size, num_winners), (_, total) in subsets.items():
            if size == k and num_winners:
                wins += total / num_winners
    return wins / math.comb(len(answers), k)


_Subsets = dict[tuple[int, int], tuple[int, float]]


def _with_answer(subsets: _Subsets, count: int, value: float, most_votes: int, k: int) -> _Subsets:
    """Add 0 to `most_votes` of the `count` equal answers to every subset of at most k."""
    found: _Subsets = {}
    for (size, num_winners), (number, total) in subsets.items():
        for votes in range(min(count, most_votes, k - size) + 1):
            wins = votes == most_votes
            ways = math.comb(count, votes)
            key = size + votes, num_winners + wins
            old_number, old_total = found.get(key, (0, 0.0))
            won = value * number if wins else 0.0
            found[key] = old_number + ways * number, old_total + ways * (total + won)
    return found


AnswerT = TypeVar("AnswerT", bound=Hashable)


def most_frequent_answer(answers_by_prompt: Sequence[Sequence[AnswerT]]) -> tuple[AnswerT, float]:
    """Return the answer that most prompts get, and its share of all prompts.

    A prompt that was asked several times counts by the share of its answers that are this one.
    Among equally frequent answers, the first one wins.

    Args:
        answers_by_prompt: Answers to each prompt, at least one. A prompt must not occur twice.
    """
    shares: dict[AnswerT, float] = {}
    for answers in answers_by_prompt:
        for answer in answers:
            shares[answer] = shares.get(answer, 0.0) + 1 / len(answers)
    answer = max(shares, key=lambda one: shares[one])
    return answer, shares[answer] / len(answers_by_prompt)


def is_one_answer(share: float, share_before: float, max_share: float) -> bool:
    """Return whether too many prompts get one answer.

    Two conditions must hold. The share is above max_share. The odds, share / (1 - share), are more
    than ONE_ANSWER_ODDS times those of the earlier policy. The second one excludes a task with few
    right answers, such as yes and no. It uses odds, since a share of 0.4 cannot triple.
    """
    odds, odds_before = share * (1 - share_before), share_before * (1 - share)
    return share > max_share and odds > ONE_ANSWER_ODDS * odds_before


def distinct_bigrams(responses: Sequence[Sequence[int]]) -> float:
    """Return the number of different bigrams over that of all bigrams (distinct-2, Li et al. 2016).

    It falls with the number of tokens, so compare it only on batches of the same size and kind. It
    is 0 if there are no bigrams.
    """
    bigrams = [pair for response in responses for pair in pairwise(response)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0
