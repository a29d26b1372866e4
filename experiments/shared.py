"""What the studies share: runs that are made once, figures over seeds, tables and plots."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.measuring.statistics import t_interval
from rlhf.runs.folder import CONFIG, RESULTS
from rlhf.runs.run import RunSettings
from rlhf.runs.settings import load_config, settings_in_force

Settings = TypeVar("Settings", bound=RunSettings)

RUNS = ("runs/tiny", "runs/tiny-seed1", "runs/tiny-seed2")
"""What `make pipeline`, with SEED=1 and with SEED=2 write: one run folder a seed."""
TABLE = "table.md"
"""In a study's folder, beside results.json: its figures as people read them."""
INK = "#333333"
DPI = 130


def settings_of(config_class: type[Settings], folder: str | Path) -> Settings:
    """The settings that the run in a folder was made with.

    Raises:
        ValueError: there is no run, or its settings are those of another program.
    """
    return load_config(config_class, ["--config", str(Path(folder) / CONFIG)])


def is_finished(folder: str | Path) -> bool:
    return (Path(folder) / RESULTS).is_file()


def make(stage: Callable[[Settings], object], config: Settings) -> None:
    """Run a stage, unless the folder of these settings holds a finished run of them.

    Raises:
        ValueError: the finished run was made with other settings; or what the stage raises.
    """
    if not is_finished(config.output_dir):
        stage(config)
    elif differences := find_differences(config):
        raise ValueError(
            f"{config.output_dir} is a finished run with other settings: {'; '.join(differences)}; "
            "move it away to have it made anew"
        )


def find_differences(config: RunSettings) -> list[str]:
    """What the run in the folder of these settings was made with that they have otherwise."""
    made = settings_in_force(settings_of(type(config), config.output_dir))
    wanted = settings_in_force(config)
    return [
        f"{key} is {made[key]}, not {value}"
        for key, value in wanted.items()
        if key != "overwrite" and made[key] != value
    ]


def read_json(path: str | Path) -> dict[str, Any]:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def over_seeds(values: Sequence[float]) -> dict[str, Any]:
    """A figure as results.json has it: its value in each run, their mean and 95 % t interval."""
    mean, interval = t_interval(values)
    return {"mean": mean, "interval": interval, "values": list(values)}


def mean_cell(values: Sequence[float], digits: int) -> str:
    """Mean and half of the 95 % t interval over seeds: `3.049 ± 0.333`; of one seed its value."""
    mean, (_, high) = t_interval(values)
    half_width = f" ± {high - mean:.{digits}f}" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{half_width}"


def values_cell(values: Sequence[float], digits: int) -> str:
    """The value of each seed: `3.186, 2.918, 3.044`."""
    return ", ".join(f"{value:.{digits}f}" for value in values)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
