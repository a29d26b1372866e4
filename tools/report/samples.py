"""Choose samples of a run for a page, and mark the words in which they differ."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from rlhf.inputs.records import to_messages
from stages.evaluate.config import SAMPLE_KEYS
from tools.report.figures import Figure, Source
from tools.report.folders import RunFolder, Stage

NUM_PROMPTS = 16
"""Prompts that are shown in the order of the file, so that nobody chose them."""
NUM_DISAGREEMENTS = 6
"""Prompts that are shown because reward model and gold disagree most on them."""
MAX_CHARACTERS = 2_000
"""Most characters of a text to show; the file has the rest."""

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")
_MARKS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {
    0x7F: "\u2421",
    **{code: f"[U+{code:04X}]" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))},
    **{code: f"[U+{code:04X}]" for code in (0x200E, 0x200F, 0x061C)},
}
"""Maps control characters, and those that change the direction of text, to what shows them."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a response."""

    text: str
    is_new: bool
    """Whether the response that it is compared with does not have it there."""


@dataclass(frozen=True)
class Response:
    """One response of one policy."""

    label: str
    pieces: list[Piece]
    figures: list[tuple[str, Figure]]
    """Scores and parts, by name."""
    notes: list[str] = field(default_factory=list)
    """Further remarks, such as that it was cut."""


@dataclass(frozen=True)
class Sample:
    """A prompt with responses, side by side."""

    prompt: str
    responses: list[Response]
    changes: dict[str, float]
    """Maps a judge to the score of the last response minus that of the one it is compared with."""
    do_judges_disagree: bool = False
    """Whether it is shown because the judges disagree on it, not by its place in the file."""


@dataclass(frozen=True)
class Samples:
    """The samples of a page."""

    shown: list[Sample]
    num_prompts: int
    """Prompts to choose from."""
    stages: Sequence[Stage]
    """The stages that sampled them."""


def find_samples(runs: Sequence[RunFolder]) -> Samples:
    """Return samples of the evaluation; without one, those of the last stage that sampled."""
    evaluations = [run.evaluation for run in runs]
    if all(evaluations):
        return _of_evaluations(
            [one for one in evaluations if one is not None], [run.name for run in runs]
        )
    stages = [(run, one) for run in runs for one in run.stages if one.samples]
    if not stages:
        return Samples([], 0, [])
    last = stages[-1][1].stage
    alike = [(run, stage) for run, stage in stages if stage.stage == last]
    shown: list[Sample] = []
    num_prompts = 0
    for run, stage in alike:
        by_prompt = _rows_by_prompt(stage)
        num_prompts += len(by_prompt)
        name = f"{run.name} {stage.name}" if len(runs) > 1 else stage.name
        origin = f"{stage.origin}samples.jsonl"
        shown += [_of_prompt(rows, name, origin) for rows in by_prompt[:NUM_PROMPTS]]
    return Samples(shown, num_prompts, [stage for _, stage in alike])


@dataclass(frozen=True)
class _Question:
    """One prompt with the first response of each policy of each run."""

    rows: dict[tuple[int, str], tuple[int, dict[str, Any]]]
    """Maps number of the evaluation and policy to a row and its place in the file."""
    baseline: str | None

    @property
    def before(self) -> dict[str, Any] | None:
        """The row that the others are compared with: the first baseline's."""
        return next(
            (row for (_, name), (_, row) in self.rows.items() if name == self.baseline), None
        )

    @property
    def last(self) -> dict[str, Any]:
        return list(self.rows.values())[-1][1]

    @property
    def disagreement(self) -> float:
        """How much the reward model's score rises if gold falls; 0 unless both happen."""
        changes = _changes(self.last, self.before)
        reward, gold = changes.get("rm"), changes.get("gold")
        return 0.0 if reward is None or gold is None or gold >= 0 else max(0.0, reward)


def _of_evaluations(evaluations: Sequence[Stage], names: Sequence[str]) -> Samples:
    """Choose prompts that all evaluations have, and show the responses of all their policies."""
    first = evaluations[0].results
    baseline = None if first is None else first.get("baseline")
    questions: dict[str, _Question] = {}
    for number, evaluation in enumerate(evaluations):
        for place, row in evaluation.samples.items():
            key = json.dumps(row.get("prompt"), sort_keys=True)
            question = questions.setdefault(key, _Question({}, baseline))
            question.rows.setdefault((number, str(row.get("policy"))), (place, row))
    shared = [
        question
        for question in questions.values()
        if len({number for number, _ in question.rows}) == len(evaluations)
    ]
    as_they_come, rest = shared[:NUM_PROMPTS], shared[NUM_PROMPTS:]
    disagreeing = sorted(
        (one for one in rest if one.disagreement > 0), key=lambda one: -one.disagreement
    )
    shown = [
        _side_by_side(one, evaluations, names, do_judges_disagree=False) for one in as_they_come
    ]
    shown += [
        _side_by_side(one, evaluations, names, do_judges_disagree=True)
        for one in disagreeing[:NUM_DISAGREEMENTS]
    ]
    return Samples(shown, len(shared), evaluations)


def _side_by_side(
    question: _Question,
    evaluations: Sequence[Stage],
    names: Sequence[str],
    *,
    do_judges_disagree: bool,
) -> Sample:
    before = question.before
    responses = []
    for (number, policy), (place, row) in question.rows.items():
        origin = f"{evaluations[number].origin}samples.jsonl"
        label = f"{names[number]}: {policy}" if len(evaluations) > 1 else policy
        responses.append(_response(label, row, origin, place, None if row is before else before))
    return Sample(
        _prompt_text(question.last), responses, _changes(question.last, before), do_judges_disagree
    )


def _response(
    label: str, row: Mapping[str, Any], origin: str, place: int, before: Mapping[str, Any] | None
) -> Response:
    source = Source({"rows": {str(place): dict(row)}}, origin)
    names: list[tuple[str, ...]] = [(name,) for name in row if name not in SAMPLE_KEYS]
    names += [("parts", name) for name in row.get("parts") or {}]
    figures = []
    for name in names:
        figure = source.figure("rows", place, *name, digits=2)
        if figure is not None:
            pointer = figure.origin.replace("#/rows/", "#/")
            digits = 0 if float(figure.value).is_integer() else figure.digits
            figures.append((name[-1], Figure(figure.value, pointer, digits)))
    notes = [] if row.get("finished", True) else ["cut before its end"]
    text = str(row.get("response", ""))
    return Response(
        label, mark_new(text, None if before is None else before["response"]), figures, notes
    )


def _changes(last: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, float]:
    if before is None:
        return {}
    return {
        name: float(value) - float(before[name])
        for name, value in last.items()
        if name not in SAMPLE_KEYS
        and isinstance(value, int | float)
        and isinstance(before.get(name), int | float)
    }


def _rows_by_prompt(stage: Stage) -> list[list[tuple[int, dict[str, Any]]]]:
    """Return the rows of each prompt, with their places in the file."""
    by_prompt: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for place, row in stage.samples.items():
        by_prompt.setdefault(json.dumps(row.get("prompt"), sort_keys=True), []).append((place, row))
    return list(by_prompt.values())


def _of_prompt(rows: Sequence[tuple[int, dict[str, Any]]], name: str, origin: str) -> Sample:
    """Return a stage's own sample: first against last, or response against demonstration."""
    (first_place, first), (last_place, last) = rows[0], rows[-1]
    if "demonstration" in last:
        shown = {"response": last["demonstration"]}
        responses = [Response("demonstration", mark_new(str(shown["response"]), None), [])]
        responses.append(_response(name, _plain(last), origin, last_place, shown))
        return Sample(_prompt_text(last), responses, {})
    responses = [_response(_at_step(name, first), _plain(first), origin, first_place, None)]
    if last_place != first_place:
        responses.append(_response(_at_step(name, last), _plain(last), origin, last_place, first))
    return Sample(_prompt_text(last), responses, _changes(_plain(last), _plain(first)))


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what is no score: the step and the texts."""
    return {key: value for key, value in row.items() if key not in ("step", "demonstration")}


def _at_step(name: str, row: Mapping[str, Any]) -> str:
    return f"{name}, update {row['step']}" if "step" in row else name


def mark_new(text: str, before: str | None) -> list[Piece]:
    """Split a text into pieces, and mark those that the other text does not have there.

    None as the other text marks nothing.
    """
    shown = show_text(text)
    if before is None:
        return [Piece(shown, False)]
    own, other = (_WORDS.findall(one) for one in (shown, show_text(before)))
    matcher = SequenceMatcher(None, other, own, autojunk=False)
    pieces = []
    for kind, _, _, start, end in matcher.get_opcodes():
        if start < end:
            pieces.append(Piece("".join(own[start:end]), kind != "equal"))
    return pieces or [Piece("", False)]


def show_text(text: str) -> str:
    """Return a text that is safe to look at: short enough, with its control characters visible."""
    more = len(text) - MAX_CHARACTERS
    cut = text if more <= 0 else f"{text[:MAX_CHARACTERS]} [{more:,} more characters]"
    whole = cut.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate is no UTF-8
    return whole.translate(_MARKS)


def _prompt_text(row: Mapping[str, Any]) -> str:
    prompt = row.get("prompt")
    if not isinstance(prompt, list):
        return show_text(str(prompt))
    messages = to_messages(prompt)
    return show_text("\n".join(f"{turn['role']}: {turn['content']}" for turn in messages))
