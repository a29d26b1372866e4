"""Read what runs left in their folders, whether they are finished, at work or dead."""

import json
import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import yaml

from rlhf.runs.folder import ALARMS, CONFIG, LINEAGE, LOCK, MARK, METRICS, RESULTS, SAMPLES
from tools.report.figures import Source

NONFINITE = "nonfinite.json"
EVALUATE = "evaluate"
ORDER = ("data", "pretrain", "sft", "collect", "rm", "ppo", "evaluate", "benchmark")
"""Stages in the order of the recipe; programs below data/ count as data."""
MAX_ROWS = 20_000
"""Most rows of samples.jsonl to read, half of them from its end, so that the page of a long run is
quick to make."""


@dataclass(frozen=True)
class Stage:
    """One stage's folder."""

    name: str
    """Name of the folder, such as ppo_ptx."""
    stage: str
    """Name of the program, such as ppo."""
    folder: Path
    origin: str
    """Number of the run on the page and the folder within it: `0:ppo_ptx/`."""
    settings: dict[str, Any]
    lineage: dict[str, Any]
    results: Source | None
    """None means that the stage is not finished."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Maps the place in samples.jsonl, from 0, to a row."""
    num_rows_left_out: int = 0
    """Rows of samples.jsonl that were not read, between the first and the last ones."""
    alarms: list[dict[str, Any]] = field(default_factory=list)
    """Rows with step, code and message; a run of an older version has none."""
    nonfinite: dict[str, Any] | None = None
    """Where a value was NaN or infinite, if that ended the run."""
    is_running: bool = False
    """Whether a process of this machine holds the folder."""

    @property
    def is_finished(self) -> bool:
        """Whether its results are there. Not every program that makes data writes results."""
        return self.results is not None or self.stage.split(".")[0] not in ORDER[1:]

    @property
    def last_step(self) -> int | None:
        """The last step that was logged."""
        steps = [row["step"] for row in self.metrics if isinstance(row.get("step"), int)]
        return max(steps, default=None)

    @property
    def num_steps(self) -> int | None:
        """Steps of the whole run, where the settings say so."""
        number = self.settings.get("num_updates")
        return number if isinstance(number, int) else None

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run: one stage, or a pipeline of stages below it."""

    name: str
    """What the page calls the run."""
    folder: Path
    number: int
    """Place of the run on the page, from 0."""
    stages: list[Stage]
    """All stages in the order of the recipe; the evaluation is the last."""

    @property
    def evaluation(self) -> Stage | None:
        """The finished evaluation. Of several it is the one in the run's own folder, since those
        below it answer other questions and have pages of their own."""
        found = [one for one in self.stages if one.stage == EVALUATE and one.results is not None]
        return max(reversed(found), key=lambda one: one.folder == self.folder, default=None)

    def of(self, stage: str) -> list[Stage]:
        return [one for one in self.stages if one.stage == stage]


def read_run(path: str | Path, number: int = 0, name: str | None = None) -> RunFolder:
    """Read a run's folder and the stages below it.

    Args:
        number: Place of the run on the page.
        name: What the page calls the run; None means the folder's own name.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: It is a file, holds no run, or holds a file that cannot be read.
    """
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist; give the folder of a run")
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file; give the folder of a run, such as runs/tiny")
    places = [(folder, "")] if _is_stage(folder) else []
    places += [(one, f"{one.name}/") for one in sorted(folder.iterdir()) if _is_stage(one)]
    stages = [_read_stage(place, f"{number}:{prefix}") for place, prefix in places]
    if not stages:
        raise ValueError(
            f"{folder} holds no run: neither it nor a folder in it has {LINEAGE} or {MARK}; give a "
            "folder that a stage wrote, or that holds such folders"
        )
    stages.sort(key=lambda one: (_rank(one.stage), one.name))
    return RunFolder(name or folder.resolve().name, folder, number, stages)


def _is_stage(folder: Path) -> bool:
    return folder.is_dir() and any((folder / name).is_file() for name in (LINEAGE, MARK))


def _rank(stage: str) -> int:
    name = stage.split(".")[0]
    return ORDER.index(name) if name in ORDER else len(ORDER)


def _read_stage(folder: Path, origin: str) -> Stage:
    mark = _read_object(folder / MARK)
    lineage = _read_object(folder / LINEAGE)
    results, nonfinite = folder / RESULTS, folder / NONFINITE
    samples, num_left_out = _read_ends(folder / SAMPLES)
    return Stage(
        name=folder.resolve().name,
        stage=lineage.get("stage") or mark.get("program", "unknown"),
        folder=folder,
        origin=origin,
        settings=_read_settings(folder / CONFIG) or mark.get("settings") or {},
        lineage=lineage,
        results=_read_source(results, origin) if results.is_file() else None,
        metrics=_read_rows(folder / METRICS),
        samples=samples,
        num_rows_left_out=num_left_out,
        alarms=_read_rows(folder / ALARMS),
        nonfinite=_read_object(nonfinite) if nonfinite.is_file() else None,
        is_running=_is_held(folder / LOCK),
    )


def _read_source(path: Path, origin: str) -> Source:
    return Source(_read_object(path), origin + path.name)


def _read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; a missing file is an empty one."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not complete JSON ({error}); run the stage again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and an object was expected")
    return content


def _read_settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return settings if isinstance(settings, dict) else {}


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read all rows of a JSON Lines file; a missing file has none."""
    return [row for _, row in _parse(path, _lines(path))]


def _read_ends(path: Path) -> tuple[dict[int, dict[str, Any]], int]:
    """Read the first and the last rows of a JSON Lines file, MAX_ROWS at most.

    Returns:
        The rows by their place in the file, from 0, and the number of rows in between.
    """
    lines = _lines(path)
    first = list(islice(lines, MAX_ROWS // 2))
    last = deque(lines, maxlen=MAX_ROWS // 2)
    num_left_out = last[0][0] - first[-1][0] - 1 if last else 0
    return dict(_parse(path, [*first, *last])), num_left_out


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            yield from enumerate(file)


def _parse(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of lines; a last line that a run is still writing is left out."""
    for place, line in lines:
        try:
            row = json.loads(line)
        except ValueError as error:
            if not line.endswith("\n"):
                return
            raise ValueError(f"{path}, line {place + 1} is not JSON: {error}") from error
        if isinstance(row, dict):
            yield place, row


def _is_held(lock: Path) -> bool:
    """Return whether the process that the lock names is alive on this machine."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        pid, host = int(holder["pid"]), holder["host"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return host == socket.gethostname() and (pid == os.getpid() or psutil.pid_exists(pid))
