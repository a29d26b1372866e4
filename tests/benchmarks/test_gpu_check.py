"""Tests the check for a GPU on a CPU: its runner, its page, and its parts on a tiny model."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_check import __main__ as program
from benchmarks.gpu_check import peers as peers_part
from benchmarks.gpu_check import runner
from benchmarks.gpu_check.memory import summary
from benchmarks.gpu_check.noise import spread
from benchmarks.gpu_check.parts import PARTS, TOTAL_SECONDS, Part
from benchmarks.gpu_check.peers import peers
from benchmarks.gpu_check.records import PAGE, RESULTS, Emit, Record, Skipped, finite, page
from benchmarks.gpu_check.runner import run_parts
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.suite import outcomes
from benchmarks.gpu_check.worker import check_device, measure_of, run_part

ROOT = Path(__file__).parents[2]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


def test_the_limits_add_up_to_nine_minutes_and_every_part_has_its_function() -> None:
    assert sum(part.seconds for part in PARTS) <= TOTAL_SECONDS == 9 * 60
    for part in PARTS:
        assert measure_of(part.name).__name__ == part.name


@NO_GPU
@pytest.mark.long
def test_a_smoke_run_goes_to_its_end_and_says_what_it_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The limits are for a GPU's machine; a busy CPU may need longer to import the packages.
    patient = [replace(part, seconds=TOTAL_SECONDS) for part in PARTS]
    monkeypatch.setattr(program, "PARTS", patient)
    monkeypatch.chdir(ROOT)  # where the worker finds the package
    assert program.main(["--smoke", "--output_dir", str(tmp_path)]) == 0

    records = {row["name"]: row for row in json.loads((tmp_path / RESULTS).read_text("utf-8"))}
    assert list(records) == [part.name for part in PARTS]
    skipped = {name for name, row in records.items() if row["status"] == "skipped"}
    assert skipped == {"tests", "allocator", "peers"}
    assert all(records[name]["reason"].startswith("no CUDA device") for name in skipped)
    assert all(row["status"] == "passed" for name, row in records.items() if name not in skipped)

    noise, decoding, rows = (records[name]["rows"] for name in ("noise", "decoding", "rows"))
    of_sampler = [row for row in noise if row["difference"] == "sampler, packed pass"]
    assert [row["tokens"] for row in of_sampler] == [10, 50] * 2
    assert all(0 < row["mean"] < row["mean's limit"] for row in of_sampler)
    assert all(row["mean"] < row["quantile 0.999"] <= row["largest"] for row in of_sampler)
    # 8 episodes of 8 tokens. On a CPU two layings of the same tokens agree to the bit.
    assert [row["groups"] for row in of_sampler] == [6, 1] * 2
    assert all(row["largest"] == 0 for row in noise if row["difference"] == "rollout, training")
    # Layers x keys and values x rows x (prompt and all but the last new token) x width x bytes.
    caches = [6 * 2 * batch * (8 + 2) * 32 * 2 / 1e6 for batch in (2, 4)] * 2
    assert [row["cache, MB"] for row in decoding] == pytest.approx(caches)
    assert [row["cache"] for row in decoding] == ["torch.bfloat16"] * 4
    assert [row["attention"] for row in rows] == ["mask", "flash", "flex", "mask", "flex"] * 2
    assert [row["responses"] for row in rows] == [1, 1, 1, 4, 4] * 2
    for row in rows:
        if row["attention"] == "flash":
            assert "flash" in row["note"].lower()
            continue
        assert row["off by, nats"] < 0.05
        assert row["off by, nats"] == 0 or row["attention"] == "flex"
        assert row["forward, ms"] > 0 and row["with backward, ms"] > 0
    assert "only a GPU" in records["peak"]["rows"][0]["note"]
    # The page shows the same records.
    text = (tmp_path / PAGE).read_text(encoding="utf-8")
    found = [Record(**{**row, "rows": tuple(row["rows"])}) for row in records.values()]
    assert text == page(found)
    for row in records.values():
        assert f"| {row['name']} | {row['status']} |" in text


@NO_GPU
def test_full_sized_work_is_skipped_without_a_gpu(tmp_path: Path) -> None:
    for part in PARTS[1:]:
        with pytest.raises(Skipped, match="no CUDA device"):
            check_device(part, Setting(tmp_path))
    check_device(PARTS[0], Setting(tmp_path))
    may_run = [part.name for part in PARTS if part.without_gpu != "skip"]
    assert may_run == ["environment", "models", "noise", "decoding", "rows", "peak"]
    check_device(PARTS[1], Setting(tmp_path, is_smoke=True))


def stand_in(bodies: dict[str, str]) -> Callable[..., list[str]]:
    """Make a command whose parts do what `bodies` says, instead of the worker's command."""
    lines = [
        "import os, sys, time",
        "from pathlib import Path",
        "from benchmarks.gpu_check.parts import Part",
        "from benchmarks.gpu_check.setting import Setting",
        "from benchmarks.gpu_check.worker import run_part",
    ]
    for name, body in bodies.items():
        lines += [f"def {name}(setting, emit):", f"    emit({{'part': {name!r}}})", f"    {body}"]
    lines += [
        "folder = Path(sys.argv[1])",
        "for name in sys.argv[2].split(','):",
        "    part = Part(name, 'a question', 1, 'run')",
        "    record = run_part(part, globals().get, Setting(folder), folder / 'records')",
        "    if record.status == 'failed': break",
    ]

    def command(folder: Path, names: str) -> list[str]:
        return [sys.executable, "-c", "\n".join(lines), str(folder), names]

    return command


@pytest.mark.slow
def test_a_part_that_fails_dies_or_hangs_does_not_lose_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    child = f"import pathlib, time; time.sleep(6); pathlib.Path({str(tmp_path / 'late')!r}).touch()"
    bodies = {
        "first": "pass",
        "raises": "raise ValueError('no such kernel')",
        "dies": "print('the last words', flush=True); os._exit(7)",
        "hangs": f"import subprocess; subprocess.run([sys.executable, '-c', {child!r}])",
        "skips": "from benchmarks.gpu_check.records import Skipped; raise Skipped('no need')",
        "last": "pass",
    }
    monkeypatch.setattr(runner, "worker_command", stand_in(bodies))
    # Starting a process counts for its first part, so only the part that hangs gets little time.
    limits = {name: 4 if name == "hangs" else 60 for name in bodies}
    parts = [Part(name, "a question", seconds) for name, seconds in limits.items()]
    emitted: list[Record] = []
    records = run_parts(parts, tmp_path, [], seconds=100, emit=emitted.append)

    assert emitted == records
    assert {one.name: one.status for one in records} == {
        "first": "passed",
        "raises": "failed",
        "dies": "failed",
        "hangs": "failed",
        "skips": "skipped",
        "last": "passed",
    }
    reasons = {one.name: one.reason for one in records}
    assert reasons["raises"] == "ValueError: no such kernel"
    assert reasons["dies"] == "its process ended with code 7: the last words"
    assert "the limit is 4 s" in reasons["hangs"]
    assert reasons["skips"] == "no need"
    # Rows from before a failure are kept.
    assert all(one.rows == ({"part": one.name},) for one in records)
    time.sleep(3)
    assert not (tmp_path / "late").exists(), "what a part started ends with it"


def test_parts_for_which_no_time_is_left_are_skipped(tmp_path: Path) -> None:
    (record,) = run_parts([PARTS[0]], tmp_path, [], seconds=0, emit=lambda _: None)
    assert (record.status, record.reason) == ("skipped", "no time is left of 0 s")


def test_a_package_that_is_missing_fails_its_part_only(tmp_path: Path) -> None:
    def find(name: str) -> Callable[[Setting, Emit], None]:
        raise ModuleNotFoundError("No module named 'trl'")

    record = run_part(PARTS[0], find, Setting(tmp_path), tmp_path)
    assert record.status == "failed" and record.reason.endswith("No module named 'trl'")


def test_programs_start_without_any_package() -> None:
    """Otherwise no page could say what is missing."""
    forbidden = "torch transformers accelerate numpy matplotlib jsonargparse".split()
    code = (
        "import sys, benchmarks.gpu_check.__main__, benchmarks.gpu_check.worker\n"
        f"print([name for name in {forbidden} if name in sys.modules])"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.check_output(command, cwd=ROOT, text=True).strip() == "[]"


def test_page_has_a_column_for_every_name_in_the_rows() -> None:
    record = Record("rows", "Which?", "passed", 1.6, "", ({"a": 1, "b": 0.123456}, {"c": "x|\ny"}))
    table = "| a | b | c |\n| --- | --- | --- |\n| 1 | 0.1235 |  |\n|  |  | x\\| y |\n"
    assert page([record]).endswith(f"## rows\n\nWhich?\n\n{table}")
    assert "| rows | passed | 2 |  |\n" in page([record])


def test_figures_that_are_no_numbers_are_words() -> None:
    assert finite({"a": float("nan"), "b": float("-inf"), "c": 1.5, "d": None}) == {
        "a": "nan",
        "b": "-inf",
        "c": 1.5,
        "d": None,
    }


def test_spread_is_the_mean_over_groups() -> None:
    tensor = torch.tensor([1.0, 1.0, 1.0, 1.0, 5.0, 1.0])
    # One of the three groups of two holds the 5; its 99.9 % quantile is 1 + 0.999 * 4.
    found = spread(tensor, 2)
    assert found["groups"] == 3
    assert found["mean"] == pytest.approx(10 / 6)
    assert found["largest"] == pytest.approx(7 / 3)
    assert found["quantile 0.999"] == pytest.approx((1 + 1 + 1 + 0.999 * 4) / 3)
    assert spread(tensor[:5], 2)["groups"] == 2  # the fifth token does not fill a group


def test_memory_of_a_rollout_in_figures() -> None:
    points = [(2_000_000_000, 3_000_000_000), (4_000_000_000, 7_000_000_000)]
    points += [(1_000_000_000, 6_000_000_000)]
    assert summary(points, 2) == {
        "allocated at first, GB": 2.0,
        "most allocated, GB": 4.0,
        "reserved at last, GB": 6.0,
        "reserved / most allocated": 1.5,
        "largest gap, GB": 5.0,
        "retries": 2,
    }


def test_outcomes_of_tests_are_read_from_pytests_report() -> None:
    report = """<testsuites><testsuite>
        <testcase name="right" time="0.5" />
        <testcase name="wrong" time="2"><failure message="assert 1 == 2">...</failure></testcase>
        <testcase name="broken" time="0"><error message="no fixture" /></testcase>
        <testcase name="left" time="0"><skipped message="no CUDA device" /></testcase>
    </testsuite></testsuites>"""
    assert list(outcomes(report)) == [
        {"test": "right", "outcome": "passed", "seconds": 0.5},
        {"test": "wrong", "outcome": "failure", "seconds": 2.0, "note": "assert 1 == 2"},
        {"test": "broken", "outcome": "error", "seconds": 0.0, "note": "no fixture"},
        {"test": "left", "outcome": "skipped", "seconds": 0.0, "note": "no CUDA device"},
    ]


def test_rows_without_their_peer_are_skipped_and_failed_ones_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_part, "PEERS_PYTHON", tmp_path / "no python")
    monkeypatch.setattr(peers_part, "quick_row", lambda name, _: {"ours, s": 1.0})
    emitted: list = []
    peers(Setting(tmp_path), emitted.append)
    assert emitted[0] == {"row": "rm_k9", "ours, s": 1.0}
    assert emitted[1]["row"] == "ppo_best" and "no python does not exist" in emitted[1]["note"]

    def refuse(name: str, _: Setting) -> None:
        raise ValueError("unequal work")

    monkeypatch.setattr(peers_part, "quick_row", refuse)
    with pytest.raises(RuntimeError, match="rm_k9"):
        peers(Setting(tmp_path), emitted.append)
    assert emitted[2] == {"row": "rm_k9", "note": "failed: unequal work"} and len(emitted) == 4
