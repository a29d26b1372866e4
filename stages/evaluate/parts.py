"""Split the gold score into its parts, such as whether a response is right, polite or brief.

The gold score is a callable, which may also have two methods:

    parts(prompts, responses) -> list[dict[str, float]]   one dict a response
    kinds(prompts) -> list[str]                           the kind of task of each prompt

The dicts of a prompt may leave out a part that the prompt does not ask for. See
data/tinyworld/gold.py and data/instructions/checks.py.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlhf.generation.answers import Answer
from rlhf.inputs.records import Prompt
from rlhf.measuring.statistics import bootstrap_interval
from rlhf.rewards.functions import call_on_batch, columns_of, row_name
from stages.evaluate.measures import Scores

PartsByPrompt = list[list[dict[str, float]]]
"""Maps each part to its value, for every response of every prompt."""


@dataclass(frozen=True)
class Grader:
    """Wraps a gold score that gives its parts."""

    name: str
    """package.module:name of the function that made the gold score."""
    gold: Any

    def grade(self, answers: Sequence[Sequence[Answer]]) -> PartsByPrompt:
        """Return the parts of every answer, grouped by prompt as the answers are.

        Raises:
            ValueError: `parts` failed, or gave something other than numbers by name.
        """
        columns = columns_of([answer for group in answers for answer in group])
        found = call_on_batch(
            lambda prompts, responses, metas: self.gold.parts(prompts, responses),
            f"{self.name} (parts)",
            columns,
            "a list of dicts, one number a part",
        )
        parts = iter([self._check(row_name(i, columns[0]), row) for i, row in enumerate(found)])
        return [list(islice(parts, len(group))) for group in answers]

    def kinds(self, questions: Sequence[Prompt]) -> list[str] | None:
        """Return the kind of each prompt, or None if gold does not give kinds.

        Raises:
            ValueError: `kinds` failed, or gave the wrong number of kinds.
        """
        if not hasattr(self.gold, "kinds"):
            return None
        found = call_on_batch(
            lambda prompts, responses, metas: self.gold.kinds(prompts),
            f"{self.name} (kinds)",
            (questions, [""] * len(questions)),
            "a list with one kind a prompt",
        )
        return [str(kind) for kind in found]

    def _check(self, place: str, row: Any) -> dict[str, float]:
        if isinstance(row, Mapping):
            parts = {str(name): _to_number(value) for name, value in row.items()}
            if all(map(math.isfinite, parts.values())):
                return parts
        raise ValueError(
            f"{self.name} (parts) gave {row!r} for {place}; it must give a dict of finite "
            "numbers by name of the part"
        )


def find_grader(gold: Any, name: str) -> Grader | None:
    """Return a grader, or None if there is no gold or it does not give its parts."""
    return Grader(name, gold) if hasattr(gold, "parts") else None


def part_names(parts: PartsByPrompt) -> list[str]:
    """Return the names of all parts of all responses, in the order in which they first appear."""
    return list(dict.fromkeys(name for of_prompt in parts for row in of_prompt for name in row))


def part_scores(parts: PartsByPrompt, name: str) -> Scores:
    """Return the values of one part; a prompt that does not ask for it has none."""
    return [[row[name] for row in of_prompt if name in row] for of_prompt in parts]


def describe_parts(
    parts: PartsByPrompt, right_part: str | None, kinds: Sequence[str] | None, seed: int
) -> dict[str, Any]:
    """Compute the mean of every part over responses.

    The part that says what is right also gets an interval and its means by kind.
    """
    names = part_names(parts)
    figures: dict[str, Any] = {"parts": {name: _mean(part_scores(parts, name)) for name in names}}
    if right_part not in names:
        return figures
    right = part_scores(parts, right_part)
    figures |= {"right": _mean(right), "right_interval": bootstrap_interval(right, seed)}
    if kinds is not None:
        figures["right_by_kind"] = {
            kind: _mean(of_kind) for kind, of_kind in group_by_kind(right, kinds).items()
        }
    return figures


def group_by_kind(by_prompt: Scores, kinds: Sequence[str]) -> dict[str, Scores]:
    """Group the prompts' values by kind, sorted by kind; leave out prompts without any value."""
    groups: dict[str, Scores] = defaultdict(list)
    for values, kind in zip(by_prompt, kinds, strict=True):
        if values:
            groups[kind].append(values)
    return dict(sorted(groups.items()))


def _mean(by_prompt: Scores) -> float:
    values = [value for of_prompt in by_prompt for value in of_prompt]
    return math.fsum(values) / len(values)


def _to_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
