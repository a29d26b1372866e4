"""Does the reward model hear each part of the gold score? Pairs of samples that differ in one part.

Two responses to one prompt that are equal in all parts but one differ in nothing else that gold can
see, so the share of them that the reward model orders as that part does is its accuracy on the
part: on the policy's own samples, where PPO will ask it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlhf.measuring.statistics import share_interval
from stages.evaluate.measures import Scores
from stages.evaluate.parts import group_by_kind


@dataclass(frozen=True)
class Judged:
    """A response, its parts by gold, and its score by the reward model."""

    response: str
    parts: Mapping[str, float]
    score: float


def outcomes_by_part(judged: Sequence[Sequence[Judged]]) -> dict[str, Scores]:
    """Part -> for each prompt, an outcome a pair of different responses that differ in it alone.

    An outcome is 1 where the reward model scores the response higher that is better by the part,
    0 where it scores it lower, and 0.5 for a tie. Each different response of a prompt counts once,
    however often it was sampled.
    """
    outcomes: dict[str, Scores] = {}
    for number, of_prompt in enumerate(judged):
        different = {one.response: one for one in of_prompt}.values()
        for one, other in combinations(different, 2):
            part = _only_difference(one, other)
            if part is not None:
                by_prompt = outcomes.setdefault(part, [[] for _ in judged])
                by_prompt[number].append(_outcome(one, other, part))
    return outcomes


def pair_figures(
    outcomes: Mapping[str, Scores],
    right_part: str | None,
    kinds: Sequence[str] | None,
    seed: int,
) -> dict[str, Any]:
    """Accuracy and pairs by part; of the part that says what is right also an interval (drawn over
    prompts) and the accuracy by kind."""
    figures: dict[str, Any] = {}
    right = [] if right_part is None else outcomes.get(right_part, [])
    if right_part is not None:
        figures["right_pairs"] = _count(right)
    if right:
        figures["right_accuracy"] = _accuracy(right)
        figures["right_accuracy_interval"] = share_interval(right, seed)
    if right and kinds is not None:
        by_kind = group_by_kind(right, kinds)
        figures["right_accuracy_by_kind"] = {k: _accuracy(of) for k, of in by_kind.items()}
    return figures | {
        "accuracy_by_part": {part: _accuracy(of) for part, of in outcomes.items()},
        "pairs_by_part": {part: _count(of) for part, of in outcomes.items()},
    }


def _only_difference(one: Judged, other: Judged) -> str | None:
    """The part in which two responses differ, if it is one part alone."""
    if one.parts.keys() != other.parts.keys():
        return None
    differing = [part for part in one.parts if one.parts[part] != other.parts[part]]
    return differing[0] if len(differing) == 1 else None


def _outcome(one: Judged, other: Judged, part: str) -> float:
    if one.score == other.score:
        return 0.5
    return float((one.score > other.score) == (one.parts[part] > other.parts[part]))


def _count(by_prompt: Scores) -> int:
    return sum(map(len, by_prompt))


def _accuracy(by_prompt: Scores) -> float:
    return sum(map(sum, by_prompt)) / _count(by_prompt)
