"""Write the rows of a comparison: JSON for programs, a table for people."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.tables import markdown_table

RESULTS = "results.json"
TABLE = "results.md"

REQUIRED = ("name", "time_ratio", "memory_ratio", "ours", "theirs", "checked", "machine", "commit")
"""Keys of every row. `time_ratio` is theirs / ours, and `memory_ratio` is ours / theirs."""
TARGETS = {
    "rm_k9": (18.0, 1.0),
    "rm_k4": (6.0, 1.0),
    "rm_k2": (1.3, 1.0),
    "ppo_fp32": (2.0, 0.6),
    "ppo_best": (3.0, 0.6),
    "ppo_eos": (4.0, 0.6),
}
"""Smallest time ratio and largest memory ratio that we want on a CPU."""


def write(rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write results.json, a list of rows, and results.md; keep earlier rows of other names."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    own = {row["name"] for row in rows}
    merged = [row for row in before if row["name"] not in own] + list(rows)
    merged.sort(key=lambda row: list(TARGETS).index(row["name"]))
    for row in merged:
        check_row(row)
    path.write_text(json.dumps(merged, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (folder / TABLE).write_text(markdown(merged), encoding="utf-8")


def check_row(row: Mapping[str, Any]) -> None:
    """Raise an AssertionError unless a row has all that this module promises."""
    missing = [key for key in REQUIRED if key not in row]
    assert not missing, f"{row.get('name')} lacks {missing}"
    for side in ("ours", "theirs"):
        assert len(row[side]["seconds"]) == len(row["ours"]["seconds"]) > 0
        assert all(value > 0 for value in row[side]["seconds"])


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format ratios and rates, then our phases, then the settings and machine of each side."""
    header = (
        "row", "time ratio", "of the pairs", "memory ratio", "ours s", "theirs s", "ours GB",
        "theirs GB", "ours tokens/s", "theirs tokens/s",
    )  # fmt: skip
    parts = [markdown_table(header, [_cells(row) for row in rows])]
    parts.append(
        "time ratio: theirs / ours, median over pairs of samples run in turn, beside it the "
        "smallest and the largest; memory ratio: ours / theirs, peaks of the whole programs; "
        "tokens: of the data, each prompt and each response once.\n"
    )
    parts.append(markdown_table(("row", "seconds of our phases"), [_phases(row) for row in rows]))
    parts.append(markdown_table(("row", "ours", "theirs"), [_settings(row) for row in rows]))
    machines = sorted({_machine(row) for row in rows})
    return "\n".join([*parts, *(f"{line}\n" for line in machines)])


def _cells(row: Mapping[str, Any]) -> list[str]:
    ours, theirs = row["ours"], row["theirs"]
    ratios = [b / a for a, b in zip(ours["seconds"], theirs["seconds"], strict=True)]
    return [
        row["name"],
        f"{row['time_ratio']:.2f}",
        f"{min(ratios):.2f}-{max(ratios):.2f} ({len(ratios)})",
        f"{row['memory_ratio']:.2f}",
        f"{statistics.median(ours['seconds']):.2f}",
        f"{statistics.median(theirs['seconds']):.2f}",
        f"{ours['peak_bytes'] / 1e9:.2f}",
        f"{theirs['peak_bytes'] / 1e9:.2f}",
        f"{ours['tokens_per_second']:.0f}",
        f"{theirs['tokens_per_second']:.0f}",
    ]


def _phases(row: Mapping[str, Any]) -> list[str]:
    phases = row["ours"]["phases"].items()
    return [row["name"], ", ".join(f"{name} {value:.2f}" for name, value in phases)]


def _settings(row: Mapping[str, Any]) -> list[str]:
    return [row["name"], row["ours"]["settings"], row["theirs"]["settings"]]


def _machine(row: Mapping[str, Any]) -> str:
    machine = row["machine"]
    note = f" ({machine['note']})" if machine.get("note") else ""
    return (
        f"{machine['device']}, {machine['threads']} threads, commit {row['commit']}, "
        f"{row['date']}{note}"
    )
