"""Tests the comparison of two engines of benchmarks, with numbers worked by hand."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.benchmark_agreement import Config, compare, compare_engines

PIQA = {"policy": "sft", "task": "piqa", "rendering": "plain", "shots": 0}
TEXT = {"policy": "sft", "task": "text", "rendering": "plain", "shots": 0}


def choice(question: int, *logprobs: float, acc: float, **changes: Any) -> dict[str, Any]:
    responses = [[value, False] for value in logprobs]
    row = {"draw": 0, "question": question, "responses": responses, "target": 0, "acc": acc}
    return {**PIQA, **row, **changes}


def answer(text: str, bits: float) -> dict[str, Any]:
    row = {"draw": 0, "question": 0, "responses": [text], "target": "a", "bits": [bits, 8]}
    return {**TEXT, **row}


OURS = [choice(0, -1.5, -2.0, acc=1.0), choice(1, -4.0, -3.0, acc=0.0), answer("b", 5.0)]
THEIRS = [choice(0, -1.5, -1.75, acc=1), choice(1, -2.9375, -3.0, acc=1), answer("b", 6.0)]


def test_differences_are_counted_by_setting() -> None:
    assert compare(OURS, THEIRS) == [
        {**PIQA, "questions": 2, "largest_difference": 1.0625, "differ": 1},
        {**TEXT, "questions": 1, "largest_difference": None, "differ": 0},
    ]


def test_runs_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(ValueError, match="question 0 of piqa has the target 0 in one run and 1 in"):
        compare(OURS[:1], [choice(0, -1.0, acc=1, target=1)])
    for ours, theirs in ((OURS[:1], THEIRS), (OURS, THEIRS[1:])):
        with pytest.raises(ValueError, match="only one of the runs has some question"):
            compare(ours, theirs)


def write(folder: Path, engine: str, rows: list[dict[str, Any]], acc: float, seconds: float) -> str:
    folder.mkdir()
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = {
        "engine": engine,
        "figures": [{**PIQA, "metric": "acc", "value": acc}],
        "cpu_seconds": [{**PIQA, "seconds": seconds}],
    }
    (folder / "results.json").write_text(json.dumps(results))
    return str(folder)


def test_the_table_has_both_figures_and_the_ratio_of_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = write(tmp_path / "ours", "packed", OURS[:2], 0.5, 4.0)
    theirs = write(tmp_path / "theirs", "hflm", THEIRS[:2], 1.0, 9.0)
    out = str(tmp_path / "compared")
    with pytest.raises(ValueError, match=f"ours is {theirs}, which holds no benchmark by packed"):
        compare_engines(Config(ours=theirs, theirs=ours, output_dir=out))
    compare_engines(Config(ours=ours, theirs=theirs, output_dir=out))
    line = "| sft | piqa | plain | 0 | 2 | acc 1.0000 | acc 0.5000 | 1.0625 | 1 | 2.25 |"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "compared" / "table.md").read_text()
    (one,) = json.loads((tmp_path / "compared" / "results.json").read_text())["settings"]
    assert one["ours"] == {"acc": 0.5} and one["theirs_cpu_seconds"] == 9.0
