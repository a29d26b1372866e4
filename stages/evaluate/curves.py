"""Draw the learning curves of the stages from their metrics.jsonl in one picture."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.runs.folder import METRICS

NUM_COLUMNS = 3
INK = "#333333"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Colours of Okabe and Ito, which colour-blind readers can tell apart."""
SMOOTHED_FROM = 30
"""Number of points from which a curve gets a running mean, over a tenth of them, in front of the
raw points."""


@dataclass(frozen=True)
class Panel:
    """Describes one small plot, with a line for each stage that logs one of the keys."""

    title: str
    unit: str
    lines: Mapping[str, str]
    """Maps each metric key to its label, which is empty in a panel with a single key."""
    floor: float | None = None
    """Lowest value to show. None means that all are shown."""


PANELS = (
    Panel(
        "Pretraining: loss",
        "nats a token",
        {"pretrain/loss": "training", "pretrain/held_out_loss": "held out"},
    ),
    Panel("SFT: loss", "nats a token", {"sft/loss": "training", "sft/held_out_loss": "held out"}),
    Panel(
        "Reward model: loss", "nats a pair", {"rm/loss": "training", "rm/held_out_loss": "held out"}
    ),
    Panel(
        "Reward model: pair accuracy",
        "share of pairs",
        {"rm/accuracy": "training", "rm/held_out_accuracy": "held out"},
    ),
    Panel("PPO: score", "reward model", {"ppo/score": ""}),
    Panel("PPO: KL to SFT", "nats a response", {"ppo/kl": ""}),
    Panel("PPO: response length", "tokens", {"ppo/response_tokens": ""}),
    Panel("PPO: responses that end", "share", {"ppo/eos_rate": ""}),
    Panel("PPO: entropy", "nats a token", {"ppo/entropy": ""}),
    Panel("PPO: pretraining loss", "nats a token", {"ppo/ptx_loss": ""}),
    Panel("PPO: variance explained", "share", {"ppo/explained_variance": ""}, floor=-1.0),
    Panel("PPO: tokens a second", "episode tokens", {"ppo/tokens_per_second": ""}),
    Panel("PPO: clipped tokens", "share", {"ppo/clip_fraction": ""}),
    Panel("PPO: most frequent response", "share of prompts", {"ppo/one_answer": ""}),
)

Curve = tuple[list[float], list[float]]
"""Steps and values."""


def draw_curves(stages: Mapping[str, str], path: Path) -> None:
    """Draw what these stages logged; leave out panels without any curve.

    Args:
        stages: maps names to folders with metrics.jsonl; a folder without one has no curves.
        path: The PNG to write. Without any curve, none is written.
    """
    logs = {name: read_metrics(Path(folder) / METRICS) for name, folder in stages.items()}
    drawn = [(panel, curves) for panel in PANELS if (curves := find_curves(panel, logs))]
    if not drawn:
        path.unlink(missing_ok=True)
        print("evaluate: no stage logged anything to draw, so there are no learning curves")
        return
    num_rows = -(-len(drawn) // NUM_COLUMNS)
    figure = Figure(figsize=(4.2 * NUM_COLUMNS, 2.7 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, NUM_COLUMNS, squeeze=False).ravel()
    colours = _colours(drawn)
    explained: set[str] = set()
    for (panel, curves), axes in zip(drawn, grid, strict=False):
        _draw_panel(axes, panel, curves, colours)
        explained |= _explain(axes, explained)
    for axes in grid[len(drawn) :]:
        axes.remove()
    figure.supxlabel("optimizer step (PPO: update)", fontsize=9, color=INK)
    figure.savefig(path, dpi=130)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a metrics file; a missing file has none."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="\n") as file:  # str.splitlines would split at U+2028
        return [json.loads(line) for line in file]


def find_curves(
    panel: Panel, logs: Mapping[str, list[dict[str, Any]]]
) -> dict[tuple[str, str], Curve]:
    """Return the curve of each (stage, metric key) that was logged as a number."""
    curves: dict[tuple[str, str], Curve] = {}
    for stage, rows in logs.items():
        for key in panel.lines:
            points = [(r["step"], r[key]) for r in rows if isinstance(r.get(key), int | float)]
            if points:
                steps, values = zip(*points, strict=True)
                curves[stage, key] = (list(steps), list(values))
    return curves


def _colours(drawn: Sequence[tuple[Panel, Mapping[tuple[str, str], Curve]]]) -> dict[str, str]:
    """Choose a colour for each stage; stages that never share a panel may share a colour."""
    colours: dict[str, str] = {}
    for _, curves in drawn:
        in_panel = dict.fromkeys(stage for stage, _ in curves)
        taken = {colours[stage] for stage in in_panel if stage in colours}
        free = iter([colour for colour in COLOURS if colour not in taken])
        for stage in in_panel:
            if stage not in colours:
                colours[stage] = next(free, COLOURS[0])
    return colours


def _draw_panel(
    axes: Axes, panel: Panel, curves: Mapping[tuple[str, str], Curve], colours: Mapping[str, str]
) -> None:
    num_stages = len({stage for stage, _ in curves})
    for (stage, key), (steps, values) in curves.items():
        what = panel.lines[key]
        label = " ".join(part for part in (stage if num_stages > 1 else "", what) if part)
        held_out = "held_out" in key
        style: dict[str, Any] = {"color": INK if held_out else colours[stage], "linewidth": 1.6}
        if held_out:
            style |= {"marker": "o", "markersize": 3, "linewidth": 1.2}
        elif len(values) >= SMOOTHED_FROM:
            axes.plot(steps, values, color=colours[stage], alpha=0.2, linewidth=0.8)
            values = running_mean(values, len(values) // 20)
        axes.plot(steps, values, label=label, **style)
    axes.set_title(panel.title, loc="left", fontsize=10, fontweight="bold", color=INK)
    axes.set_ylabel(panel.unit, fontsize=8, color=INK)
    axes.tick_params(labelsize=8, length=2, color=INK, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.margins(x=0.02)
    if panel.floor is not None and axes.get_ylim()[0] < panel.floor:
        axes.set_ylim(bottom=panel.floor)


def _explain(axes: Axes, explained: set[str]) -> set[str]:
    """Add a legend if a label has not been explained yet; return the panel's labels."""
    labels = set(axes.get_legend_handles_labels()[1])
    if len(labels) > 1 and not labels <= explained:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return labels


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and its neighbours, up to `reach` on either side."""
    sums = [0.0, *accumulate(values)]
    windows = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]
