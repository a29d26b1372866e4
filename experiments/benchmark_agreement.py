"""python -m experiments.benchmark_agreement

This study asks whether our packed passes give what the harness's own HFLM gives. It compares two
runs of the stage `benchmark` with equal settings but for the engine: every log-likelihood, every
answer and every figure (docs/benchmark_tasks.md). It reads their folders and runs no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.shared import TABLE, read_json, read_rows
from experiments.tables import markdown_table
from rlhf.runs.folder import RESULTS, SAMPLES, folders_released
from rlhf.runs.program import run_stage
from rlhf.runs.run import open_run
from rlhf.runs.settings import FolderSettings

SETTING = ("policy", "task", "rendering", "shots")
"""What one line of the table is about."""
QUESTION = (*SETTING, "draw", "question")
"""What names a row of samples.jsonl."""
HEADER = (
    *SETTING,
    "questions",
    "HFLM",
    "ours",
    "largest difference, nats",
    "right in one run only",
    "HFLM / ours, CPU seconds",
)

Key = tuple[Any, ...]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Config(FolderSettings):
    """Compare two runs of benchmarks, one by our passes and one by the harness's HFLM."""

    ours: str = "runs/agreement/packed"
    """Folder of the run with engine packed."""
    theirs: str = "runs/agreement/hflm"
    """Folder of the run with engine hflm."""
    output_dir: str = "runs/agreement/compared"
    """Folder of table.md and results.json."""


@folders_released()
def compare_engines(config: Config) -> None:
    """Write the table, with a line for each setting of a task."""
    folders = {"ours": config.ours, "theirs": config.theirs}
    record = open_run(
        config, stage="benchmark_agreement", inputs=folders, files=(TABLE,), always_runs=True
    )
    results = {name: read_json(Path(folder) / RESULTS) for name, folder in folders.items()}
    for name, engine in (("ours", "packed"), ("theirs", "hflm")):
        if results[name].get("engine") != engine:
            raise ValueError(f"{name} is {folders[name]}, which holds no benchmark by {engine}")
    samples = {name: read_rows(Path(folder) / SAMPLES) for name, folder in folders.items()}
    compared = compare(samples["ours"], samples["theirs"])
    for one in compared:
        key = tuple(one[name] for name in SETTING)
        for name, of in results.items():
            one[name] = {row["metric"]: row["value"] for row in of["figures"] if at(row) == key}
            (one[f"{name}_cpu_seconds"],) = (
                row["seconds"] for row in of["cpu_seconds"] if at(row) == key
            )
    text = markdown_table(HEADER, [line_of(one) for one in compared])
    (record.dir / TABLE).write_text(text, encoding="utf-8")
    record.finish({"settings": compared})
    print(text)


def compare(ours: Sequence[Row], theirs: Sequence[Row]) -> list[Row]:
    """Compare two runs' answers, setting by setting.

    Returns:
        For each setting its number of questions, the largest difference of a log-likelihood in nats
        (None if there are none), and how many questions have a metric that is 1 in one run and 0 in
        the other.

    Raises:
        ValueError: The runs have other questions, or a question's target differs between them.
    """
    by_question = {at(row, QUESTION): row for row in theirs}
    if by_question.keys() != {at(row, QUESTION) for row in ours}:
        raise ValueError("only one of the runs has some question; run both with the same settings")
    compared: dict[Key, Row] = {}
    for row in ours:
        other = by_question[at(row, QUESTION)]
        if row["target"] != other["target"]:
            raise ValueError(
                f"question {row['question']} of {row['task']} has the target {row['target']!r} in "
                f"one run and {other['target']!r} in the other; run both with the same settings, "
                "on the same files"
            )
        empty = {"questions": 0, "largest_difference": None, "differ": 0}
        one = compared.setdefault(at(row), dict(zip(SETTING, at(row), strict=True)) | empty)
        one["questions"] += 1
        one["differ"] += any(
            (row[name], other[name]) in ((0, 1), (1, 0))
            for name in row.keys() - {*QUESTION, "responses", "target", "prompt"}
        )
        for mine, their in zip(row["responses"], other["responses"], strict=True):
            if isinstance(mine, list):  # [log-likelihood, whether greedy decoding gives it]
                difference = abs(mine[0] - their[0])
                one["largest_difference"] = max(one["largest_difference"] or 0.0, difference)
    return list(compared.values())


def at(row: Row, names: Sequence[str] = SETTING) -> Key:
    return tuple(row[name] for name in names)


def line_of(one: Row) -> list[str]:
    """Format a setting as a line of the table."""
    largest = one["largest_difference"]
    return [
        *(str(one[name]) for name in (*SETTING, "questions")),
        *(figures_cell(one[name]) for name in ("theirs", "ours")),
        "-" if largest is None else f"{largest:.4f}",
        str(one["differ"]),
        f"{one['theirs_cpu_seconds'] / one['ours_cpu_seconds']:.2f}",
    ]


def figures_cell(figures: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in figures.items())


def main() -> None:
    run_stage(compare_engines, Config)


if __name__ == "__main__":
    main()
