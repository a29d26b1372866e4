"""The page of a run is written now and then, and never breaks the run."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf.runs import page
from rlhf.runs.folder import MARK, PAGE, add_to_mark
from rlhf.runs.page import Page
from rlhf.runs.run import Run, open_run


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings for these tests."""

    output_dir: str
    force: bool = False


@dataclass
class Clock:
    """Shows a time that passes only if a test says so."""

    now: float = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(page, "time", clock)
    return clock


def pretend(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Any]) -> list[list[str]]:
    """Replace the program that writes pages, and note how it is called."""
    calls: list[list[str]] = []

    def noted(command: list[str], **_: Any) -> Any:
        calls.append(command)
        return run(command)

    replaced = SimpleNamespace(run=noted, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(page, "subprocess", replaced)  # other modules keep the real one
    return calls


def open_at(folder: Path, *, force: bool = False) -> Run:
    return open_run(Settings(output_dir=str(folder), force=force), stage="sft", inputs={})


def test_pages_take_at_most_a_twentieth_of_the_time(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_three_seconds(command: list[str]) -> Any:
        clock.now += 3
        return subprocess.CompletedProcess(command, 0, b"", b"")

    calls = pretend(monkeypatch, take_three_seconds)
    made = Page(tmp_path)
    made.refresh()
    assert calls == []  # a run that has just begun
    clock.now += 20
    made.refresh()
    assert [command[1:] for command in calls] == [["-m", "tools.report", str(tmp_path)]]
    clock.now += 59
    made.refresh()
    assert len(calls) == 1
    clock.now += 1
    made.refresh()
    assert len(calls) == 2


def test_the_last_page_of_a_run_is_written_if_there_was_one(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = pretend(monkeypatch, lambda words: subprocess.CompletedProcess(words, 0, b"", b""))
    made = Page(tmp_path)
    made.refresh(is_last=True)
    assert calls == []
    (tmp_path / PAGE).touch()
    made.refresh(is_last=True)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OSError("no python here"), "no python here"),
        (subprocess.TimeoutExpired("report", 120), "timed out after 120 seconds"),
        (b"Traceback\n  ...\nKeyError: 'x'\n", "KeyError: 'x'"),
    ],
)
def test_a_page_that_fails_is_one_line(
    tmp_path: Path,
    fault: Any,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(command: list[str]) -> Any:
        if isinstance(fault, bytes):
            return subprocess.CompletedProcess(command, 1, b"", fault)
        raise fault

    pretend(monkeypatch, fail)
    run = open_at(tmp_path / "run")
    run.log(1, {"sft/loss": 1.0})
    capsys.readouterr()
    run.write_page()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: no new ") and line.endswith(words)
    run.finish({})
    assert (tmp_path / "run/results.json").is_file()


def test_a_finished_run_leaves_no_page_that_says_it_goes_on(tmp_path: Path) -> None:
    run = open_at(tmp_path / "run")
    run.log(1, {"sft/loss": 1.0})
    run.write_page()
    path = tmp_path / "run" / PAGE
    assert "sft" in path.read_text(encoding="utf-8") and "is at work" in path.read_text("utf-8")
    run.finish({"held_out_loss": 0.5, "base_held_out_loss": 0.75})
    text = path.read_text(encoding="utf-8")
    assert "is at work" not in text and "0.750" in text
    assert PAGE in (tmp_path / "run" / MARK).read_text()


def test_a_page_made_later_is_replaced_by_the_next_run(tmp_path: Path) -> None:
    open_at(tmp_path / "run").finish({})
    (tmp_path / "run" / PAGE).write_text("made by hand")
    add_to_mark(tmp_path / "run", PAGE)
    run = open_at(tmp_path / "run", force=True)
    run.log(1, {"sft/loss": 1.0})
    assert not (tmp_path / "run" / PAGE).exists()
    run.finish({})


def test_alarms_are_rows_that_a_resumed_run_cuts(tmp_path: Path) -> None:
    run = open_at(tmp_path / "run")
    run.alarms([{"step": 1, "code": "PPO_KL", "message": "a"}])
    run.alarms([{"step": 3, "code": "PPO_KL", "message": "b"}])
    run = open_at(tmp_path / "run")
    run.resume(2, seconds=1.0)
    run.log(3, {"ppo/kl": 1.0})
    rows = (tmp_path / "run/alarms.jsonl").read_text().splitlines()
    assert rows == ['{"step": 1, "code": "PPO_KL", "message": "a"}']
