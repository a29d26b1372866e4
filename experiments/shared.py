"""Share code between the studies: settings of runs, figures over seeds, tables and plots."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.measuring.statistics import t_interval
from rlhf.runs.folder import CONFIG, RESULTS
from rlhf.runs.run import RunSettings
from rlhf.runs.settings import load_config

Settings = TypeVar("Settings", bound=RunSettings)

RUNS = ("runs/tiny", "runs/tiny-seed1", "runs/tiny-seed2")
"""Run folders that `make pipeline` writes by itself, with SEED=1 and with SEED=2."""
TABLE = "table.md"
"""File in a study's folder with its figures as a table, beside results.json."""
INK = "#333333"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of Okabe and Ito, which colour-blind readers can tell apart."""
DPI = 130


def settings_of(config_class: type[Settings], folder: str | Path) -> Settings:
    """Load the settings that the run in a folder was made with.

    Raises:
        ValueError: there is no run, or its settings belong to another program.
    """
    return load_config(config_class, ["--config", str(Path(folder) / CONFIG)])


def is_finished(folder: str | Path) -> bool:
    return (Path(folder) / RESULTS).is_file()


def read_json(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics or samples file; a missing file has none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="\n") as file:  # str.splitlines would split at U+2028
        return [json.loads(line) for line in file]


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """Return a figure for results.json: its value in each run, their mean and 95 % t interval."""
    mean, interval = t_interval(values)
    return {"mean": mean, "interval": interval, "values": list(values)}


def mean_cell(values: Sequence[float], digits: int) -> str:
    """Format mean and half of the 95 % t interval over seeds as `3.049 ± 0.333`.

    A single seed has its value only.
    """
    mean, (_, high) = t_interval(values)
    half_width = f" ± {high - mean:.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{half_width}"


def values_cell(values: Sequence[float], digits: int) -> str:
    """Format the value of each seed as `3.186, 2.918, 3.044`."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def style_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_xlabel(x_label, fontsize=9, color=INK)
    axes.set_ylabel(y_label, fontsize=9, color=INK)
    axes.tick_params(labelsize=8, length=2, color=INK, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)


def save_figure(figure: Figure, path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
