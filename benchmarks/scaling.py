"""python -m benchmarks.scaling [--shape 9M] [--threads 2]

This program measures what our stages cost as the work grows. It varies K for an epoch of the reward
model. It varies batch, response length and text blocks an episode for a PPO update, and the size of
the model for both. It writes scaling.json and scaling.png.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks import machine
from benchmarks.__main__ import WORK_DIR
from benchmarks.folders import SHAPES, VOCAB_SIZES, policy_folder, reward_folder
from benchmarks.protocol import Worker
from benchmarks.workload import Workload, ppo_prompts, rm_data, spread_lengths
from experiments.shared import INK, save_figure, style_axes
from rlhf.runs.lineage import commit

OUTPUT = "scaling"
NUM_RESPONSES, NUM_RANKINGS = 36, 4
KS = (2, 3, 4, 6, 9)
BATCHES = (4, 8, 16, 32)
LENGTHS = (16, 32, 64, 128)
TEXT_BLOCKS = (0, 1, 2, 4, 8)
SIZES = ("1M", "9M", "35M", "135M")
BATCH, PROMPT_TOKENS, NEW_TOKENS = 16, (16, 128), 48
FLAT = "cost per token over batches, largest deviation from its mean"
PTX = "an update with 8 blocks of text an episode, in updates without"
TARGETS = {FLAT: 0.2, PTX: 2.0}


@dataclass(frozen=True)
class Panel:
    """Describes one small plot: a workload for each value of x, in one or several series."""

    title: str
    x_label: str
    series: dict[str, dict[float, Callable[[str], Workload]]]
    """maps the name of a series to x to a function from the model's shape to the workload"""
    shapes: tuple[str, ...] = ()
    """shape of the model for each x; empty means the shape of the command line"""


def main(args: Sequence[str] | None = None) -> None:
    options = _options(args)
    measured: dict[str, Any] = {}
    for panel in panels():
        print(panel.title, flush=True)
        measured[panel.title] = {
            name: [_measure(panel, i, x, points[x], options) for i, x in enumerate(points)]
            for name, points in panel.series.items()
        }
    found = {
        "machine": machine.describe(options.threads),
        "shape": options.shape,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "panels": measured,
        "summary": summarise(measured),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    body = json.dumps(found, indent=1) + "\n"
    (options.output / f"{OUTPUT}.json").write_text(body, encoding="utf-8")
    plot(measured, options.output / f"{OUTPUT}.png")
    for name, value in found["summary"].items():
        print(f"{name}: {value:.3f} (target: at most {TARGETS[name]:g})")
    print(f"scaling: wrote {options.output / OUTPUT}.json and .png")


RM_PANEL, BATCH_PANEL = "Reward model: an epoch over K", "PPO: an update over its batch"
LENGTH_PANEL, PTX_PANEL = "PPO: over response length", "PPO-ptx: over text blocks"
SIZE_PANEL = "Both: over the model's size"


def panels() -> list[Panel]:
    return [
        Panel(
            RM_PANEL,
            "responses a prompt, K",
            {
                f"{NUM_RESPONSES} responses": {
                    k: partial(rankings, k=k, num_prompts=NUM_RESPONSES // k) for k in KS
                },
                f"{NUM_RANKINGS} prompts": {
                    k: partial(rankings, k=k, num_prompts=NUM_RANKINGS) for k in KS
                },
            },
        ),
        Panel(
            BATCH_PANEL,
            "episodes",
            {"update": {count: partial(episodes, batch=count) for count in BATCHES}},
        ),
        Panel(
            LENGTH_PANEL,
            "response tokens",
            {"update": {count: partial(episodes, new_tokens=count) for count in LENGTHS}},
        ),
        Panel(
            PTX_PANEL,
            "blocks of 128 tokens an episode",
            {"update": {count: partial(episodes, text_blocks=count) for count in TEXT_BLOCKS}},
        ),
        Panel(
            SIZE_PANEL,
            "million parameters",
            {
                "PPO update": {float(name[:-1]): partial(episodes) for name in SIZES},
                "RM epoch, K = 9": {
                    float(name[:-1]): partial(rankings, k=9, num_prompts=4) for name in SIZES
                },
            },
            SIZES,
        ),
    ]


def rankings(shape: str, *, k: int, num_prompts: int) -> Workload:
    prompts, responses = rm_data(
        num_prompts=num_prompts,
        k=k,
        prompt_tokens=200,
        response_tokens=60,
        vocab_size=VOCAB_SIZES[shape],
    )
    return _workload(shape, kind="rm", prompts=prompts, responses=responses)


def episodes(
    shape: str, *, batch: int = BATCH, new_tokens: int = NEW_TOKENS, text_blocks: int = 0
) -> Workload:
    lengths = spread_lengths(batch, *PROMPT_TOKENS)
    prompts = ppo_prompts(lengths=lengths, vocab_size=VOCAB_SIZES[shape])
    work = _workload(shape, kind="ppo", prompts=prompts, new_tokens=new_tokens)
    return replace(work, text_blocks=text_blocks * batch)


def summarise(measured: dict[str, Any]) -> dict[str, float]:
    """Compute the figures that have targets."""
    (batches,) = measured[BATCH_PANEL].values()
    costs = [point["seconds"] / point["tokens"] for point in batches]
    (texts,) = measured[PTX_PANEL].values()
    return {
        FLAT: max(abs(cost / statistics.mean(costs) - 1) for cost in costs),
        PTX: texts[-1]["seconds"] / texts[0]["seconds"],
    }


def plot(measured: dict[str, Any], path: Path) -> None:
    """Draw a column for each panel, with seconds above and the cost per token below."""
    by_title = {panel.title: panel for panel in panels()}
    figure, axes = plt.subplots(
        2, len(measured), figsize=(3.4 * len(measured), 5.6), layout="constrained", squeeze=False
    )
    for column, (title, series) in enumerate(measured.items()):
        above, below = axes[0][column], axes[1][column]
        for name, points in series.items():
            x = [point["x"] for point in points]
            _line(above, x, [point["seconds"] for point in points], name)
            per_token = [1e3 * point["seconds"] / point["tokens"] for point in points]
            _line(below, x, per_token, name)
        style_axes(above, title, "", "seconds")
        style_axes(below, "", by_title[title].x_label, "milliseconds a token")
        for axis in (above, below):
            if title == SIZE_PANEL:
                axis.set_xscale("log")
                axis.set_yscale("log")
            else:
                axis.set_ylim(bottom=0)
        if len(series) > 1:
            above.legend(fontsize=8, frameon=False, labelcolor=INK)
    save_figure(figure, str(path))
    plt.close(figure)


def _line(axes: Axes, x: Sequence[float], y: Sequence[float], name: str) -> None:
    axes.plot(x, y, marker="o", markersize=4, linewidth=1.4, label=name)


def _measure(
    panel: Panel,
    number: int,
    x: float,
    make: Callable[[str], Workload],
    options: argparse.Namespace,
) -> dict[str, float]:
    """Measure the fastest of the samples, since other programs can only slow one down."""
    work = make(panel.shapes[number] if panel.shapes else options.shape)
    command = [sys.executable, "-m", "benchmarks.ours"]
    log = WORK_DIR / "logs" / "scaling.log"
    with Worker(command, work, num_threads=options.threads, log=log) as worker:
        worker.run()
        seconds = min(worker.run()["seconds"] for _ in range(options.samples))
    print(f"  {x:g}: {seconds:.2f} s, {1e3 * seconds / work.num_tokens:.3f} ms a token", flush=True)
    return {"x": x, "seconds": seconds, "tokens": work.num_tokens}


def _workload(shape: str, **settings: Any) -> Workload:
    policy = policy_folder(WORK_DIR, shape)
    reward = reward_folder(policy, WORK_DIR)
    return Workload(name="scaling", policy=str(policy), reward_model=str(reward), **settings)


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description="What our stages cost as the work grows."
    )
    parser.add_argument("--shape", default="9M", choices=SHAPES, help="model of all but one plot")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--samples", type=int, default=3, help="of which the fastest is taken")
    parser.add_argument("--output", type=Path, default=WORK_DIR)
    return parser.parse_args(args)


if __name__ == "__main__":
    main()
