"""How well scores order pairs: accuracy with its interval, log loss, calibration, baselines."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.inputs.records import Preference, PromptLike, preferences_of
from rlhf.measuring.statistics import Estimate, share_interval
from stages.rm.data import Example

ScoreFunction = Callable[[Sequence[PromptLike], Sequence[str]], Sequence[float]]
"""(prompts, responses) -> scores, one a response."""

NUM_BINS = 10


@dataclass(frozen=True)
class Pair:
    """Two responses to a prompt of which a judge prefers the first, or neither."""

    prompt: str
    """Key of the prompt; pairs of one prompt resemble each other."""
    source: str
    margin: float
    """Score of the preferred response less that of the other."""
    length_margin: int
    """Tokens of the preferred response less those of the other."""
    probability: float = 1.0
    """That the first is better, by the judge, from 1/2 (neither) to 1."""


def compare(
    examples: Sequence[Example],
    scores: Sequence[Sequence[float]],
    preferences: Sequence[Sequence[Preference]],
) -> list[Pair]:
    """The pairs that a judge compares, with the margins of the scores.

    Args:
        scores: of each example, one a response.
        preferences: of each example, with probabilities of at least 1/2.
    """
    pairs = []
    for example, score, judged in zip(examples, scores, preferences, strict=True):
        lengths = [len(response) for response in example.tree.responses]
        key = example.ranking.key
        pairs += [
            Pair(
                prompt=key,
                source=example.ranking.source or "",
                margin=score[i] - score[j],
                length_margin=lengths[i] - lengths[j],
                probability=probability,
            )
            for i, j, probability in judged
        ]
    return pairs


def label_preferences(examples: Sequence[Example]) -> list[list[Preference]]:
    """Of each example, by its labeler."""
    return [example.ranking.preferences() for example in examples]


def gold_preferences(examples: Sequence[Example], gold: ScoreFunction) -> list[list[Preference]]:
    """Of each example, by a gold score; equal scores are ties."""
    preferences = []
    for example in examples:
        ranking = example.ranking
        scores = gold([ranking.prompt] * len(ranking.responses), ranking.responses)
        preferences.append(preferences_of([-score for score in scores]))
    return preferences


def decided(pairs: Sequence[Pair]) -> list[Pair]:
    """Without those of probability 1/2, which no judge of a pair can get right or wrong."""
    return [pair for pair in pairs if pair.probability > 0.5]


def accuracy(pairs: Sequence[Pair], seed: int) -> Estimate:
    """Share of decided pairs with a positive margin, one of 0 counting half, and its 95 % interval.

    The interval is from a bootstrap over prompts, wider where they are few (share_interval). One
    prompt alone tells nothing: (0, 1).
    """
    of_prompt: dict[str, list[float]] = defaultdict(list)
    for pair in decided(pairs):
        of_prompt[pair.prompt].append(_outcome(pair.margin))
    low, high = share_interval(list(of_prompt.values()), seed)
    interval = (0.0, 1.0) if math.isnan(low) else (low, high)
    return Estimate(_mean([x for outcomes in of_prompt.values() for x in outcomes]), interval)


def length_accuracy(pairs: Sequence[Pair], *, longer_wins: bool) -> float:
    """Accuracy of a judge who looks at nothing but the number of tokens."""
    sign = 1 if longer_wins else -1
    return _mean([_outcome(sign * pair.length_margin) for pair in decided(pairs)])


def does_longer_win(pairs: Sequence[Pair]) -> bool:
    """The direction in which length orders these pairs better."""
    return length_accuracy(pairs, longer_wins=True) >= 0.5


def log_loss(pairs: Sequence[Pair]) -> float:
    """Mean cross-entropy of sigmoid(margin) to the judge's probability, in nats a pair.

    A coin has ln 2; the least that soft labels allow is their own entropy.
    """
    return _mean(
        [
            pair.probability * _softplus(-pair.margin)
            + (1 - pair.probability) * _softplus(pair.margin)
            for pair in pairs
        ]
    )


def calibration(pairs: Sequence[Pair]) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error, and the bins it comes from.

    The model says sigmoid(|margin|) for the response that it prefers. In each of ten bins of
    that confidence from 0.5 to 1 stand mean confidence and accuracy, which is the judge's mean
    probability for those responses; the error is the mean of their distance over pairs (Guo et al.
    2017).
    """
    bins: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for pair in pairs:
        confidence = 1 / (1 + math.exp(-abs(pair.margin)))
        number = min(int((confidence - 0.5) * 2 * NUM_BINS), NUM_BINS - 1)
        bins[number].append((confidence, _outcome(pair.margin, pair.probability)))
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
    """Accuracy of the decided pairs, its interval, log loss of all, and how many there are."""
    share, interval = accuracy(pairs, seed)
    return {
        "pair_accuracy": share,
        "pair_accuracy_interval": list(interval),
        "log_loss": log_loss(pairs),
        "pairs": len(decided(pairs)),
        "undecided_pairs": len(pairs) - len(decided(pairs)),
        "prompts": len({pair.prompt for pair in pairs}),
    }


def by_source(pairs: Sequence[Pair], seed: int) -> dict[str, dict[str, Any]]:
    """`figures_of` for the pairs of each source."""
    sources = sorted({pair.source for pair in pairs})
    return {
        source: figures_of([pair for pair in pairs if pair.source == source], seed)
        for source in sources
    }


def _outcome(margin: float, probability: float = 1.0) -> float:
    """Probability that a judge who goes by the margin is right about a pair."""
    if margin == 0:
        return 0.5
    return probability if margin > 0 else 1 - probability


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
