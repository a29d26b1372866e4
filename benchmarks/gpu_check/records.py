"""Keep what each part of the check found; write it as one JSON file and one page."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from experiments.tables import markdown_table

Status = Literal["running", "passed", "failed", "skipped"]
Cell = str | int | float | None
Row = dict[str, Cell]
Emit = Callable[[Row], None]
"""Takes a row of a part's table as soon as it is measured."""

RESULTS = "gpu_check.json"
PAGE = "gpu_check.md"
RECORDS = "records"

NOTE_LENGTH = 300
DIGITS = 4
"""Digits of a figure on the page; the JSON file has all."""


class Skipped(Exception):
    """Raised to say why a part, or a row of its table, is left out."""


@dataclass(frozen=True)
class Record:
    """Holds the outcome of one part."""

    name: str
    question: str
    status: Status
    """`passed` means that the part ran to its end; in `tests` also that no test failed."""
    seconds: float = 0.0
    reason: str = ""
    """Why the part was skipped or failed."""
    rows: tuple[Row, ...] = field(default=())
    """The part's table. A part that failed keeps the rows that it had."""

    def ended(self, status: Status, reason: str = "") -> "Record":
        return replace(self, status=status, reason=reason)

    @classmethod
    def from_json(cls, text: str) -> "Record":
        fields = json.loads(text)
        return cls(**{**fields, "rows": tuple(fields["rows"])})

    def to_json(self) -> str:
        return to_json(asdict(self))


def emit_filled(
    emit: Emit,
    row: Row,
    fill: Callable[[Row], None],
    noted: type[Exception] | tuple[type[Exception], ...],
) -> None:
    """Report a row after `fill` added its figures.

    An error of the types `noted` becomes the row's note: that a kernel is missing, or that memory
    runs out, is a finding and must not lose the other rows.
    """
    try:
        fill(row)
    except noted as error:
        row["note"] = f"{type(error).__name__}: {error}"[:NOTE_LENGTH]
    emit(row)


def to_json(value: Any) -> str:
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def finite(row: Mapping[str, Cell]) -> Row:
    """Write NaN and infinity as words, which JSON has no numbers for."""
    return {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def write_results(records: Sequence[Record], folder: Path) -> None:
    """Write gpu_check.json and gpu_check.md with all parts so far."""
    write_whole(folder / RESULTS, to_json([asdict(record) for record in records]))
    write_whole(folder / PAGE, page(records))


def write_whole(path: Path, text: str) -> None:
    """Write a file atomically, with the standard library alone."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def page(records: Sequence[Record]) -> str:
    """Format the summary and then each part's table, as Markdown."""
    summary = markdown_table(
        ("part", "status", "seconds", "reason"),
        [(one.name, one.status, f"{one.seconds:.0f}", _on_one_line(one.reason)) for one in records],
    )
    parts = [f"# GPU check\n\nWritten by `make gpu-check`.\n\n{summary}"]
    parts += [_section(record) for record in records if record.rows]
    return "\n".join(parts)


def _section(record: Record) -> str:
    header = list(dict.fromkeys(name for row in record.rows for name in row))
    cells = [[_cell(row.get(name)) for name in header] for row in record.rows]
    return f"## {record.name}\n\n{record.question}\n\n{markdown_table(header, cells)}"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else _on_one_line(str(value))


def _on_one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
