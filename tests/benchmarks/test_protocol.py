"""Tests the benchmark with a worker that computes nothing."""

import sys
from pathlib import Path

import pytest

from benchmarks.compare import UnequalWork, compare
from benchmarks.protocol import Worker, WorkerError, peak_bytes
from benchmarks.workload import Workload

WORK = Workload(
    name="rm_k2", kind="rm", policy="p", reward_model="r", prompts=[[1]], responses=[[[2], [3]]]
)
FAKE = """
from benchmarks.protocol import Link
link = Link()
print("a library's chatter")
assert link.work.responses == [[[2], [3]]]
link.ready(settings="none")
number = 0
while True:
    number += 1
    link.done(loss={loss}, number=number)
"""
FAILING = """
from benchmarks.protocol import Link
Link().ready()
raise RuntimeError("out of luck")
"""


def command(program: str, **values: object) -> list[str]:
    return [sys.executable, "-c", program.format(**values)]


def start(program: str, folder: Path, **values: object) -> Worker:
    return Worker(command(program, **values), WORK, num_threads=1, log=folder / "log")


def test_a_worker_stays_alive_between_samples(tmp_path: Path) -> None:
    with start(FAKE, tmp_path, loss=0.5) as worker:
        assert worker.facts["settings"] == "none"
        assert "torch" in worker.facts["versions"]
        samples = [worker.run() for _ in range(3)]
    assert [sample["number"] for sample in samples] == [1, 2, 3]
    assert all(0 < sample["seconds"] < 60 for sample in samples)
    assert all(sample["peak_bytes"] > 2**20 for sample in samples)
    assert "chatter" in (tmp_path / "log").read_text()


def test_a_worker_that_fails_is_quoted(tmp_path: Path) -> None:
    with start(FAILING, tmp_path) as worker, pytest.raises(WorkerError, match="out of luck"):
        worker.run()


def test_a_program_that_does_not_start_is_quoted(tmp_path: Path) -> None:
    with (
        pytest.raises(WorkerError, match="no_such_module"),
        start("import no_such_module", tmp_path) as worker,
    ):
        worker.run()


def test_sides_run_in_turn_after_a_warm_up(tmp_path: Path) -> None:
    fake = command(FAKE, loss=0.5)
    lines: list[str] = []
    row = compare(
        WORK,
        {"ours": fake, "theirs": fake},
        num_pairs=2,
        num_threads=1,
        log_dir=tmp_path,
        log=lines.append,
    )
    assert len(lines) == len(row["ours"]["seconds"]) == len(row["theirs"]["seconds"]) == 2
    assert row["checked"] == {"loss": [0.5, 0.5]}


def test_unequal_work_is_not_timed(tmp_path: Path) -> None:
    sides = {"ours": command(FAKE, loss=0.5), "theirs": command(FAKE, loss=0.6)}
    with pytest.raises(UnequalWork):
        compare(WORK, sides, num_pairs=1, num_threads=1, log_dir=tmp_path)


def test_peak_memory_grows_with_what_is_held() -> None:
    before = peak_bytes()
    held = bytearray(b"x" * (before + 2**26))
    assert peak_bytes() > before + 2**25
    del held
