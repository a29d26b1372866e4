"""How well scores order pairs: accuracy with its interval, log loss, calibration, baselines."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.records import prompt_key
from rlhf.statistics import Estimate, bootstrap_interval
from stages.rm.data import Example, pairs_of

NUM_BINS = 10


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt of which a judge prefers the first."""

    prompt: str
    """Key of the prompt; pairs of one prompt resemble each other."""
    source: str
    margin: float
    """Score of the preferred response less that of the other."""
    length_margin: int
    """Tokens of the preferred response less those of the other."""


def compare(
    examples: Sequence[Example],
    scores: Sequence[Sequence[float]],
    ranks: Sequence[Sequence[float]],
) -> list[Pair]:
    """All pairs that the ranks order, with the margins of the scores.

    Args:
        scores: of each example, one a response.
        ranks: of each example, one a response: smaller is better, equal ones are ties, 0 is none.
    """
    pairs = []
    for example, score, rank in zip(examples, scores, ranks, strict=True):
        lengths = [len(response) for response in example.tree.responses]
        key = prompt_key(example.prompt)
        pairs += [
            Pair(key, example.source, score[i] - score[j], lengths[i] - lengths[j])
            for i, j in pairs_of(rank)
        ]
    return pairs


def gold_ranks(gold: Sequence[float]) -> list[float]:
    """Ranks from gold scores, 1 for the highest; equal scores are ties."""
    return [1.0 + sum(other > score for other in gold) for score in gold]


def accuracy(pairs: Sequence[Pair], seed: int) -> Estimate:
    """Share of pairs with a positive margin, a margin of 0 counting half, and its 95 % interval.

    The interval is from a bootstrap over prompts. One prompt alone tells nothing: (0, 1).
    """
    return _share([_outcome(pair.margin) for pair in pairs], pairs, seed)


def length_accuracy(pairs: Sequence[Pair], *, longer_wins: bool) -> float:
    """Accuracy of a judge who looks at nothing but the number of tokens."""
    sign = 1 if longer_wins else -1
    return _mean([_outcome(sign * pair.length_margin) for pair in pairs])


def does_longer_win(pairs: Sequence[Pair]) -> bool:
    """The direction in which length orders these pairs better."""
    return length_accuracy(pairs, longer_wins=True) >= 0.5


def log_loss(pairs: Sequence[Pair]) -> float:
    """Mean of -log sigmoid(margin), in nats a pair; a coin has ln 2."""
    return _mean([_softplus(-pair.margin) for pair in pairs])


def calibration(pairs: Sequence[Pair]) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error, and the bins it comes from.

    The model says sigmoid(|margin|) for the response that it prefers. In each of ten bins of
    that confidence from 0.5 to 1 stand mean confidence and accuracy; the error is the mean of
    their distance over pairs (Guo et al. 2017).
    """
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        confidence = 1 / (1 + math.exp(-abs(pair.margin)))
        number = min(int((confidence - 0.5) * 2 * NUM_BINS), NUM_BINS - 1)
        bins[number].append((confidence, _outcome(pair.margin)))
    table = [
        {
            "confidence": _mean([confidence for confidence, _ in bins[number]]),
            "accuracy": _mean([outcome for _, outcome in bins[number]]),
            "pairs": len(bins[number]),
        }
        for number in sorted(bins)
    ]
    error = math.fsum(abs(row["confidence"] - row["accuracy"]) * row["pairs"] for row in table)
    return error / len(pairs), table


def figures_of(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    """Accuracy, its interval, log loss and the numbers of pairs and prompts."""
    share, interval = accuracy(pairs, seed)
    return {
        "pair_accuracy": share,
        "pair_accuracy_interval": list(interval),
        "log_loss": log_loss(pairs),
        "pairs": len(pairs),
        "prompts": len({pair.prompt for pair in pairs}),
    }


def by_source(pairs: Sequence[Pair], seed: int) -> dict[str, dict[str, Any]]:
    """`figures_of` for the pairs of each source."""
    sources = sorted({pair.source for pair in pairs})
    return {
        source: figures_of([pair for pair in pairs if pair.source == source], seed)
        for source in sources
    }


def _share(outcomes: Sequence[float], pairs: Sequence[Pair], seed: int) -> Estimate:
    of_prompt: dict[str, list[float]] = defaultdict(list)
    for pair, outcome in zip(pairs, outcomes, strict=True):
        of_prompt[pair.prompt].append(outcome)
    low, high = bootstrap_interval(list(of_prompt.values()), seed)
    interval = (0.0, 1.0) if math.isnan(low) else (low, high)
    return Estimate(_mean(outcomes), interval)


def _outcome(margin: float) -> float:
    return 0.5 if margin == 0 else float(margin > 0)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
