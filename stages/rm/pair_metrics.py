"""Measure how well scores order pairs: accuracy, its interval, log loss, calibration, baselines."""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.inputs.records import Preference, PromptLike, preferences_of
from rlhf.measuring.statistics import Estimate, share_interval
from stages.rm.data import Example

ScoreFunction = Callable[[Sequence[PromptLike], Sequence[str]], Sequence[float]]
"""Takes (prompts, responses) and returns one score for each response."""

NUM_BINS = 10


@dataclass(frozen=True)
class Pair:
    """Holds two responses to a prompt, the first of which a judge finds at least as good."""

    prompt: str
    """Key of the prompt. Pairs of one prompt are not independent, so the bootstrap draws
    prompts."""
    source: str
    margin: float
    """Score of the first response minus that of the second."""
    length_margin: int
    """Tokens of the first response minus those of the second."""
    probability: float = 1.0
    """Probability, by the judge, that the first is better: from 1/2 (no preference) to 1."""


def compare(
    examples: Sequence[Example],
    scores: Sequence[Sequence[float]],
    preferences: Sequence[Sequence[Preference]],
) -> list[Pair]:
    """Return the pairs that a judge compares, with the margins of the scores.

    Args:
        scores: for each example, one score a response.
        preferences: for each example, pairs with probabilities of at least 1/2.
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
    """Return the preferences of each example's labeler."""
    return [example.ranking.preferences() for example in examples]


def gold_preferences(examples: Sequence[Example], gold: ScoreFunction) -> list[list[Preference]]:
    """Return the preferences of a gold score for each example; equal scores are ties."""
    preferences = []
    for example in examples:
        ranking = example.ranking
        scores = gold([ranking.prompt] * len(ranking.responses), ranking.responses)
        preferences.append(preferences_of([-score for score in scores]))
    return preferences


def decided(pairs: Sequence[Pair]) -> list[Pair]:
    """Leave out pairs of probability 1/2, which have no right answer."""
    return [pair for pair in pairs if pair.probability > 0.5]


def accuracy(pairs: Sequence[Pair], seed: int) -> Estimate:
    """Return the share of decided pairs that the scores order right, with its 95 % interval.

    A margin of 0 counts half. The interval comes from a bootstrap over prompts, and is widened
    where prompts are few (share_interval). A single prompt gives (0, 1).
    """
    of_prompt: dict[str, list[float]] = defaultdict(list)
    for pair in decided(pairs):
        of_prompt[pair.prompt].append(_outcome(pair.margin))
    low, high = share_interval(list(of_prompt.values()), seed)
    interval = (0.0, 1.0) if math.isnan(low) else (low, high)
    return Estimate(_mean([x for outcomes in of_prompt.values() for x in outcomes]), interval)


def length_accuracy(pairs: Sequence[Pair], *, longer_wins: bool) -> float:
    """Return the accuracy of a judge who looks only at the number of tokens."""
    sign = 1 if longer_wins else -1
    return _mean([_outcome(sign * pair.length_margin) for pair in decided(pairs)])


def does_longer_win(pairs: Sequence[Pair]) -> bool:
    """Return whether preferring the longer response orders these pairs better than the shorter."""
    return length_accuracy(pairs, longer_wins=True) >= 0.5


def log_loss(pairs: Sequence[Pair]) -> float:
    """Return the mean cross-entropy of sigmoid(margin) to the judge's probability, in nats a pair.

    Equal scores give ln 2. With soft labels, the lowest possible loss is their own entropy.
    """
    return _mean(
        [
            pair.probability * _softplus(-pair.margin)
            + (1 - pair.probability) * _softplus(pair.margin)
            for pair in pairs
        ]
    )


def calibration(pairs: Sequence[Pair]) -> tuple[float, list[dict[str, float]]]:
    """Return the expected calibration error (Guo et al. 2017) and the bins it comes from.

    The model's confidence in the response that it prefers is sigmoid(|margin|), from 0.5 to 1. Each
    of ten bins of confidence has a mean confidence and an accuracy. The accuracy is the judge's
    mean probability for the responses that the model prefers. The error is the mean distance
    between the two over pairs.
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


def describe_pairs(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    """Return the accuracy of the decided pairs, its interval, the log loss of all, and counts."""
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
    """Return `describe_pairs` for the pairs of each source."""
    sources = sorted({pair.source for pair in pairs})
    return {
        source: describe_pairs([pair for pair in pairs if pair.source == source], seed)
        for source in sources
    }


def _outcome(margin: float, probability: float = 1.0) -> float:
    """Return the probability that a judge who goes by the margin is right about a pair."""
    if margin == 0:
        return 0.5
    return probability if margin > 0 else 1 - probability


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _softplus(x: float) -> float:
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))
