"""Figures that stages report, and their intervals: accuracies, win rates, means over prompts.

Samples of one prompt resemble each other, so they are no independent trials: whatever is measured
several times a prompt gets its interval by drawing whole prompts (the cluster bootstrap, Davison
and Hinkley 1997, section 3.8), not single values.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054
"""Quantile 0.975 of the standard normal."""

NUM_RESAMPLES = 2000


class Estimate(NamedTuple):
    """A figure and its 95 % interval."""

    value: float
    interval: tuple[float, float]


def wilson_interval(successes: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """Interval of a share from n independent trials (Wilson 1927), within 0 and 1 at any n.

    Args:
        successes: 0 to n; a half counts a tie.
        n: number of trials; with none the interval is the whole of 0 to 1.
        z: normal quantile of the interval's upper end.

    Raises:
        ValueError: successes are not within 0 and n.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes in {n} trials; give 0 to {n} of them")
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    centre = share + z * z / (2 * n)
    half_width = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low, high = (centre - half_width) / scale, (centre + half_width) / scale
    return max(0.0, low), min(1.0, high)


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
    return Estimate(math.fsum(outcomes) / len(outcomes), bootstrap_interval(by_prompt, seed))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean of independent values and its standard error, nan for fewer than two."""
    if not values:
        return math.nan, math.nan
    error = np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return math.fsum(values) / len(values), float(error)


def distinct_bigrams(responses: Sequence[Sequence[int]]) -> float:
    """Different pairs of neighbouring tokens as a share of all pairs (distinct-2, Li et al. 2016).

    It falls with the number of tokens, so compare it only on batches of one size and kind. 0
    without any pair.
    """
    bigrams = [pair for response in responses for pair in pairwise(response)]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0
