"""Test whether the reward model sees each part of the gold score, on pairs that differ in one part.

If two responses to a prompt differ in one part only, gold sees no other difference between them.
The reward model's accuracy on a part is the share of such pairs that it orders as the part does. It
is measured on the policy's own samples, since those are what PPO asks the reward model about.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from rlhf.measuring.statistics import share_interval
from stages.evaluate.measures import Scores
from stages.evaluate.parts import group_by_kind


@dataclass(frozen=True)
class ScoredResponse:
    """Holds a response, its parts by gold, and its score by the reward model."""

    response: str
    parts: Mapping[str, float]
    score: float


def outcomes_by_part(scored: Sequence[Sequence[ScoredResponse]]) -> dict[str, Scores]:
    """Return, for each part and prompt, the outcomes of pairs that differ in this part only.

    An outcome is 1 if the reward model scores the response higher that is better by the part, 0 if
    it scores it lower, and 0.5 for a tie. A response that was sampled several times for a prompt
    counts once.
    """
    outcomes: dict[str, Scores] = {}
    for number, of_prompt in enumerate(scored):
        different = {one.response: one for one in of_prompt}.values()
        for one, other in combinations(different, 2):
            part = _only_difference(one, other)
            if part is not None:
                by_prompt = outcomes.setdefault(part, [[] for _ in scored])
                by_prompt[number].append(_outcome(one, other, part))
    return outcomes


def pair_figures(
    outcomes: Mapping[str, Scores],
    right_part: str | None,
    kinds: Sequence[str] | None,
    seed: int,
) -> dict[str, Any]:
    """Return the reward model's accuracy and the number of pairs for each part.

    The part that says what is right also gets an interval, from a bootstrap over prompts, and its
    accuracy by kind.
    """
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


def _only_difference(one: ScoredResponse, other: ScoredResponse) -> str | None:
    """Return the part in which two responses differ, or None unless it is exactly one."""
    if one.parts.keys() != other.parts.keys():
        return None
    differing = [part for part in one.parts if one.parts[part] != other.parts[part]]
    return differing[0] if len(differing) == 1 else None


def _outcome(one: ScoredResponse, other: ScoredResponse, part: str) -> float:
    if one.score == other.score:
        return 0.5
    return float((one.score > other.score) == (one.parts[part] > other.parts[part]))


def _count(by_prompt: Scores) -> int:
    return sum(map(len, by_prompt))


def _accuracy(by_prompt: Scores) -> float:
    return sum(map(sum, by_prompt)) / _count(by_prompt)
