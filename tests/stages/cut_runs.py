"""Runs that are cut off: a command is given again and again, and the process that runs it kills
itself at a chosen moment, until one gets to its end.

The processes are forked from one that has imported the stages, so that each takes the time of its
run only. Nothing in the program knows of this: what is counted are calls of its own functions.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from rlhf.cli import run_stage
from rlhf.runs import settings_in_force
from tests.stages.conftest import is_timing

KILLED = -signal.SIGKILL
RESULTS_OF_TIME = ("seconds", "phase_seconds", "tokens_per_second", "model_flops_utilisation")
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.stages.cut_runs", "stages.ppo.train"])


@dataclass(frozen=True)
class Cut:
    """A signal that the process sends itself, just before the n-th call of a function and so many
    from then on."""

    module: str
    function: str
    call: int
    signal: int = signal.SIGKILL
    times: int = 1


def run_command(stage: str, config: Any, cut: Cut | None = None) -> tuple[int, str]:
    """Run a stage as its command line does; returns the exit code and what was printed."""
    folder = Path(config.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings, log = folder.with_suffix(".yaml"), folder.with_suffix(".log")
    settings.write_text(yaml.safe_dump(settings_in_force(config)))
    process = _SERVER.Process(target=_run, args=(stage, settings, log, cut))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, log.read_text()


def run_to_the_end(stage: str, config: Any, cuts: Iterable[Cut]) -> str:
    """Give the same command until it ends by itself; each cut must happen. Returns the last
    output."""
    for cut in cuts:
        code, printed = run_command(stage, config, cut)
        assert code == KILLED, (cut, code, printed[-2000:])
    code, printed = run_command(stage, config)
    assert code == 0, printed[-2000:]
    return printed


def outcome(folder: Path) -> dict[str, Any]:
    """All that a run leaves behind: the bytes of its weights, rows, samples and results, without
    the figures that are times."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            found[name] = [_without_times(row) for row in rows]
    for name in ("results.json", "reward.json"):
        if (folder / name).exists():
            found[name] = _without_times(json.loads((folder / name).read_text()))
    return found


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in row.items()
        if not is_timing(name) and name not in RESULTS_OF_TIME
    }


def _run(stage: str, settings: Path, log: Path, cut: Cut | None) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if cut is not None:
        _send_at(cut)
    module = importlib.import_module(f"stages.{stage}.train")
    config = importlib.import_module(f"stages.{stage}.config")
    function = module.pretrain if stage == "pretrain" else module.train
    run_stage(function, config.Config, ["--config", str(settings)])


def _send_at(cut: Cut) -> None:
    module = importlib.import_module(cut.module)
    owner, _, name = cut.function.rpartition(".")
    holder = getattr(module, owner) if owner else module
    original = getattr(holder, name)
    calls = count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if cut.call <= next(calls) < cut.call + cut.times:
            os.kill(os.getpid(), cut.signal)
        return original(*args, **kwargs)

    setattr(holder, name, counted)
