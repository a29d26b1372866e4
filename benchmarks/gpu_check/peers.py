"""Compare with TRL on the rows of `make bench`, in their quick form."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from benchmarks.__main__ import PEERS_PYTHON, REAL, commands, workload
from benchmarks.compare import compare
from benchmarks.gpu_check.records import Emit, Row, Skipped
from benchmarks.gpu_check.setting import Setting

ROWS = ("rm_k9", "ppo_best")
NUM_PAIRS = 1


def peers(setting: Setting, emit: Emit) -> None:
    """Report time and memory of each row, next to TRL's.

    Raises:
        Skipped: TRL is in no environment.
        RuntimeError: A row failed; the others are reported.
    """
    reasons = {name: why_not(name) for name in ROWS}
    if all(reasons.values()):
        raise Skipped("; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    failures = []
    for name, reason in reasons.items():
        row: Row = {"row": name}
        try:
            row |= {"note": f"skipped: {reason}"} if reason else quick_row(name, setting)
        except ValueError as error:  # a worker failed, or both sides did unequal work
            row["note"] = f"failed: {error}"[:300]
            failures.append(name)
        emit(row)
    if failures:
        raise RuntimeError(f"{', '.join(failures)}: see the notes")


def why_not(name: str) -> str:
    """Return why a row cannot be measured here, or "" if it can."""
    if importlib.util.find_spec("trl") is None:
        return "TRL is not installed"
    if name.startswith("ppo") and not PEERS_PYTHON.exists():
        return f"{PEERS_PYTHON} does not exist; make bench makes it, with a TRL that has PPO"
    return ""


def quick_row(name: str, setting: Setting) -> Row:
    """Measure one row.

    Raises:
        WorkerError, UnequalWork: As `compare`.
    """
    work = workload(name, "bfloat16", quick=True, shape=REAL)
    found: dict[str, Any] = compare(
        work,
        commands(work),
        num_pairs=NUM_PAIRS,
        num_threads=os.cpu_count() or 1,
        log_dir=Path(setting.folder) / "peers",
    )
    return {
        "type": found["dtype"],
        "theirs / ours, seconds": found["time_ratio"],
        "ours / theirs, memory": found["memory_ratio"],
        **{f"{side}, s": found[side]["median_seconds"] for side in ("ours", "theirs")},
    }
