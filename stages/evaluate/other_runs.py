"""Read the results of other runs: their reports, seconds and speeds."""

import json
from pathlib import Path
from typing import Any

from rlhf.runs.folder import RESULTS


def read_report(folder: str) -> dict[str, Any]:
    """Read a stage's results without its seconds, which are shown with those of all stages."""
    path = Path(folder)
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{folder} has no {RESULTS}, so its run is not complete; run it again")
    results = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in results.items() if key != "seconds"}


def results_of(folder: str) -> dict[str, Any]:
    """Read a stage's results; empty if the stage has not finished."""
    path = Path(folder) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def is_there(name: str, folder: str) -> bool:
    """Return whether a stage has a folder; say so if it has none."""
    there = Path(folder).is_dir()
    if not there:
        print(f"evaluate: no stage {name} at {folder}; its seconds are left out")
    return there


def speed_of(results: dict[str, Any]) -> dict[str, Any]:
    """Select tokens a second, FLOPs and seconds by phase, if the stage measures them."""
    names = ("tokens_per_second", "model_flops_utilisation", "phase_seconds")
    return {name: results[name] for name in names if name in results}
