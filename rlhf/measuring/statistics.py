"""Figures that stages and experiments report, and their intervals: accuracies, win rates, means.

Samples of one prompt resemble each other, so they are no independent trials: whatever is measured
several times a prompt gets its interval by drawing whole prompts (the cluster bootstrap, Davison
and Hinkley 1997, section 3.8), not single values.
"""

import math
from collections.abc import Hashable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np

T_975 = (
    *(12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281),
    *(2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860),
)
"""Quantile 0.975 of Student's t with 1, 2, ... degrees of freedom."""

Z_975 = 1.959964
"""Quantile 0.975 of the normal distribution."""

NUM_RESAMPLES = 2000

ONE_ANSWER_ODDS = 3.0
"""Factor by which the odds of one answer must grow to be suspicious."""


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    interval: tuple[float, float]


def bootstrap_interval(
    values_by_cluster: Sequence[Sequence[float]],
    seed: int,
    *,
    num_resamples: int = NUM_RESAMPLES,
) -> tuple[float, float]:
    """95 % percentile interval of the mean of all values, clusters drawn with replacement.

    Args:
        values_by_cluster: values of each cluster (of a prompt, say); empty clusters are left out.
        seed: of the draws; equal seeds give equal intervals.
        num_resamples: sets of clusters drawn.

    Returns:
        (low, high); (nan, nan) with fewer than two clusters, which tell nothing of their spread.
    """
    clusters = [cluster for cluster in values_by_cluster if len(cluster) > 0]
    if len(clusters) < 2:
        return math.nan, math.nan
    sums = np.array([math.fsum(cluster) for cluster in clusters])
    counts = np.array([len(cluster) for cluster in clusters])
    generator = np.random.default_rng(seed)
    means = np.empty(num_resamples)
    for i in range(num_resamples):
        drawn = generator.integers(len(clusters), size=len(clusters))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


FEW_CLUSTERS = 20


def share_interval(values_by_cluster: Sequence[Sequence[float]], seed: int) -> tuple[float, float]:
    """95 % interval of a share: `bootstrap_interval`, widened where there are few clusters.

    A bootstrap cannot draw what no cluster showed, so two prompts that agree would give an interval
    without width. With fewer than FEW_CLUSTERS it covers Wilson's (1927) for as many trials too.
    """
    low, high = bootstrap_interval(values_by_cluster, seed)
    clusters = [cluster for cluster in values_by_cluster if len(cluster) > 0]
    if not 2 <= len(clusters) < FEW_CLUSTERS:
        return low, high
    share = math.fsum(map(math.fsum, clusters)) / sum(map(len, clusters))
    least, most = wilson_interval(share, len(clusters))
    return min(low, least), max(high, most)


def wilson_interval(share: float, num_trials: int) -> tuple[float, float]:
    """95 % interval of a probability of which a share of independent trials came true (Wilson
    1927)."""
    spread = Z_975**2 / num_trials
    centre = (share + spread / 2) / (1 + spread)
    half_width = math.sqrt(spread * (share * (1 - share) + spread / 4)) / (1 + spread)
    return max(0.0, centre - half_width), min(1.0, centre + half_width)


def win_rate(
    scores_a: Sequence[Sequence[float]], scores_b: Sequence[Sequence[float]], seed: int = 0
) -> Estimate:
    """How often a response of a beats one of b to the same prompt, ties half.

    Args:
        scores_a: scores of each prompt's responses by a.
        scores_b: the same prompts' by b; of a prompt, every response is compared with every one.
        seed: of the bootstrap over prompts that gives the interval.

    Raises:
        ValueError: the two have not the same prompts, or no response at all.
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
    """Mean over prompts of a's mean less b's, and its interval by drawing prompts.

    Args:
        values_a: values of each prompt's responses by a.
        values_b: the same prompts' by b; prompts for which either has none are left out.
        seed: of the bootstrap.

    Returns:
        (nan, (nan, nan)) where no prompt is left.
    """
    differences = [
        math.fsum(a) / len(a) - math.fsum(b) / len(b)
        for a, b in zip(values_a, values_b, strict=True)
        if a and b
    ]
    if not differences:
        return Estimate(math.nan, (math.nan, math.nan))
    mean = math.fsum(differences) / len(differences)
    return Estimate(mean, bootstrap_interval([[one] for one in differences], seed))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values and its standard error, nan for fewer than two."""
    if not values:
        return math.nan, math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return math.fsum(values) / len(values), float(error)


def t_interval(values: Sequence[float]) -> Estimate:
    """Mean of a few independent values, such as of one run a seed, and its 95 % t interval.

    The interval is (nan, nan) for a single value.

    Raises:
        ValueError: there is no value, or there are more than T_975 has quantiles for.
    """
    most = len(T_975) + 1
    if not 1 <= len(values) <= most:
        raise ValueError(f"{len(values)} values; give 1 to {most}, of more take mean_and_error")
    mean, error = mean_and_error(values)
    half_width = math.nan if len(values) == 1 else T_975[len(values) - 2] * error
    return Estimate(mean, (mean - half_width, mean + half_width))


def best_of_n(proxy: Sequence[float], values: Sequence[float], n: int) -> float:
    """Expected value of the response that the proxy likes best among n of these N.

        R_n = sum_{i=n..N} C(i-1, n-1) / C(N, n) * value(y_i),   y sorted by proxy, worst first

    An unbiased estimate of best-of-n from N >= n samples of one prompt: y_i is the best of
    C(i-1, n-1) of the C(N, n) subsets (Nakano et al. 2021, appendix I). Among responses that the
    proxy scores alike the choice is taken to be random: each counts with the mean of its group.

    Args:
        proxy: (N,) scores that choose.
        values: (N,) what is wanted of the chosen response: its gold score, its length, its proxy.

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
    """Nats from the sampled policy to its best-of-n, ln n - (n-1)/n (Stiennon et al. 2020, G.3).

    Exact where no two responses have one score; an upper bound for a policy with few different
    responses, whose best-of-n has fewer places to go (Beirami et al. 2024).
    """
    return math.log(n) - (n - 1) / n


Answer = TypeVar("Answer", bound=Hashable)


def most_frequent_answer(answers_by_prompt: Sequence[Sequence[Answer]]) -> tuple[Answer, float]:
    """The answer that the most prompts get, and their share of all prompts.

    A prompt that was asked several times counts for the share of its answers that are this one. Of
    equally frequent answers it is the one that came first.

    Args:
        answers_by_prompt: answers to each prompt, at least one; a prompt must not come twice.
    """
    shares: dict[Answer, float] = {}
    for answers in answers_by_prompt:
        for answer in answers:
            shares[answer] = shares.get(answer, 0.0) + 1 / len(answers)
    answer = max(shares, key=lambda one: shares[one])
    return answer, shares[answer] / len(answers_by_prompt)


def is_one_answer(share: float, share_before: float, max_share: float) -> bool:
    """Whether one answer goes to too many prompts: to more than max_share of them, and its odds,
    share / (1 - share), have more than ONE_ANSWER_ODDS times those of the policy before.

    The second condition leaves alone a task that has few right answers, such as yes and no. Odds
    and not shares, since a share of 0.4 cannot become three times as large.
    """
    odds, odds_before = share * (1 - share_before), share_before * (1 - share)
    return share > max_share and odds > ONE_ANSWER_ODDS * odds_before


def distinct_bigrams(responses: Sequence[Sequence[int]]) -> float:
    """Different pairs of neighbouring tokens as a share of all pairs (distinct-2, Li et al. 2016).

    It falls with the number of tokens, so compare it only on batches of one size and kind. 0
    without any pair.
    """
    bigrams = [pair for response in responses for pair in pairwise(response)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0
