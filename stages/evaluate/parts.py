"""The parts of the gold score: whether a response is right, polite, brief, each for itself.

What the maker of `gold` returns may have two methods beside being called:

    parts(prompts, responses) -> list[dict[str, float]]   one dict a response
    kinds(prompts) -> list[str]                           the kind of task that each prompt is

A part that a prompt does not ask about may be left out of its dicts. See data/tinyworld/gold.py and
data/instructions/checks.py.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rlhf.chat import Chat
from rlhf.packing import PromptTree
from rlhf.records import Prompt
from rlhf.rewards import call_by_rows, row_name
from rlhf.statistics import bootstrap_interval
from stages.evaluate.measures import Scores

PartsByPrompt = list[list[dict[str, float]]]
"""Part -> its value, for each prompt's responses."""


@dataclass(frozen=True)
class Grader:
    """A gold score that gives its parts."""

    name: str
    """package.module:name of its maker."""
    gold: Any

    def grade(
        self, questions: Sequence[Prompt], trees: Sequence[PromptTree], chat: Chat
    ) -> PartsByPrompt:
        """The parts of every response, grouped by prompt.

        Raises:
            ValueError: `parts` failed, or gave something else than numbers by name.
        """
        rows = [
            (question, chat.decode(response))
            for question, tree in zip(questions, trees, strict=True)
            for response in tree.responses
        ]
        columns = ([question for question, _ in rows], [response for _, response in rows])
        found = call_by_rows(
            lambda prompts, responses, metas: self.gold.parts(prompts, responses),
            f"{self.name} (parts)",
            columns,
            "a list of dicts, one number a part",
        )
        parts = iter([self._check(row_name(i, columns[0]), row) for i, row in enumerate(found)])
        return [list(islice(parts, len(tree.responses))) for tree in trees]

    def kinds(self, questions: Sequence[Prompt]) -> list[str] | None:
        """The kind of each prompt; None where gold does not tell them.

        Raises:
            ValueError: `kinds` failed, or gave another number of kinds.
        """
        if not hasattr(self.gold, "kinds"):
            return None
        found = call_by_rows(
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
    """None where there is no gold, or it does not give its parts."""
    return Grader(name, gold) if hasattr(gold, "parts") else None


def part_names(parts: PartsByPrompt) -> list[str]:
    """All parts that any response has, in the order in which they come."""
    return list(dict.fromkeys(name for of_prompt in parts for row in of_prompt for name in row))


def part_scores(parts: PartsByPrompt, name: str) -> Scores:
    """One part's values; none for a prompt that does not ask about it."""
    return [[row[name] for row in of_prompt if name in row] for of_prompt in parts]


def describe_parts(
    parts: PartsByPrompt, right_part: str | None, kinds: Sequence[str] | None, seed: int
) -> dict[str, Any]:
    """Means over responses: of every part, and of the one that says whether a response is right."""
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
    """Kind -> values of its prompts, kinds in the order of the alphabet; prompts without any value
    are left out."""
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
