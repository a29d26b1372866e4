"""Pairs of one prompt kept together, or shuffled as examples of their own: which overfits?

Ouyang et al. 2022, section 3.5: shuffled, "a single pass over the dataset caused the reward model
to overfit", since each of K responses is then in K - 1 optimizer steps of an epoch; with all pairs
of a prompt in one batch element it is in one. Here both arms train on the same pairs from the same
start, at the same constant learning rate, with the same number of pairs a step on average and so
the same number of steps. A shuffled pair weighs 1 / (pairs of its prompt), so that both arms have
the same objective and differ in nothing but the grouping; held-out prompts are ranked whole in
both. Not the paper's setting in size: few prompts are trained on, because overfitting shows
sooner, and a shuffled epoch costs several times a grouped one.

    python -m experiments.grouped_pairs --runs "[runs/tiny, runs/tiny-seed1]" \
        --output_dir runs/grouped_pairs

Each run is a folder of the pipeline; its reward model's settings (RUN/rm/config.yaml) are used but
for what is compared. Finished arms are kept, so an interrupted study goes on where it stopped.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.cli import run_stage
from rlhf.config import load_config
from rlhf.datasets import read_records, write_records
from rlhf.records import Ranking
from rlhf.runs import CONFIG, METRICS, RESULTS, open_run, settings_in_force
from rlhf.statistics import t_interval
from stages.evaluate.curves import COLOURS, INK, read_metrics
from stages.rm.config import Config as RewardModelConfig
from stages.rm.train import train

ARMS = ("grouped", "shuffled")

FIGURES = {
    "loss": "training loss, nats a pair",
    "held_out_loss": "held-out loss, nats a pair",
    "held_out_accuracy": "held-out accuracy by labels",
    "held_out_accuracy_gold": "held-out accuracy by gold",
}
"""Metric of the rm stage -> what it is. The training loss is the mean over the epoch's steps."""

Epochs = list[dict[str, float]]
"""The figures after each epoch."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Reward models from pairs of a prompt together and from shuffled pairs, on several seeds."""

    runs: list[str]
    """Folders of the pipeline, one a seed, at least two."""
    output_dir: str
    """Folder of this study: a folder a run with its split and both arms, table.md, results.json."""
    num_prompts: int = 400
    """Prompts of each run that are trained on, drawn by the run's seed."""
    num_held_out: int = 400
    """Other prompts of each run, that are measured on."""
    num_epochs: int = 4
    """Passes over the pairs, measured after each."""
    plot: str = "docs/experiments/grouped_pairs.png"
    """The picture to write."""

    def __post_init__(self) -> None:
        if len({Path(run).name for run in self.runs}) != len(self.runs) or len(self.runs) < 2:
            raise ValueError(f"runs is {self.runs}; give two or more folders of different names")
        for name in ("num_prompts", "num_held_out", "num_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")


def study(config: Config) -> None:
    """Train both arms of every run, then write table, figures and plot.

    Raises:
        ValueError: a run has too few prompts, or settings that the rm stage refuses.
        OSError: a run's folder is not there or not complete.
    """
    settings = {run: f"{run}/rm/{CONFIG}" for run in config.runs}
    record = open_run(config, stage="grouped_pairs", inputs=settings)
    epochs: dict[str, list[Epochs]] = {arm: [] for arm in ARMS}
    for path in settings.values():
        base = load_config(RewardModelConfig, ["--config", path])
        for arm, arm_config in make_arms(base, config).items():
            if not is_finished(arm_config):
                train(arm_config)
            epochs[arm].append(read_epochs(Path(arm_config.output_dir)))
    results = {"runs": config.runs, **epochs, "differences": differences(epochs)}
    table = format_table(epochs)
    print(table)
    (record.dir / "table.md").write_text(table + "\n", encoding="utf-8")
    draw(epochs, Path(config.plot))
    record.finish(results)


def make_arms(base: RewardModelConfig, config: Config) -> dict[str, RewardModelConfig]:
    """Writes the split of a run's rankings for both arms; returns their settings."""
    run = Path(base.output_dir).parent.name
    folder = Path(config.output_dir) / run / f"{config.num_prompts}_{config.num_held_out}_prompts"
    rankings = [record for source in base.rankings for record in read_records(source, Ranking)]
    train_rankings, held_out = split(rankings, config.num_prompts, config.num_held_out, base.seed)
    pairs = shuffled_pairs(train_rankings)
    files = {"grouped": train_rankings, "shuffled": pairs, "held_out": held_out}
    for name, records in files.items():
        write_records(folder / f"{name}.jsonl", records)
    pairs_of_prompt = len(pairs) / sum(bool(ranking.pairs()) for ranking in train_rankings)
    batch_sizes = {
        "grouped": base.batch_size,
        "shuffled": round(base.batch_size * pairs_of_prompt),
    }
    return {
        arm: replace(
            base,
            output_dir=str(folder / arm),
            rankings=[str(folder / f"{arm}.jsonl")],
            held_out=None,
            held_out_rankings=[str(folder / "held_out.jsonl")],
            max_rankings=None,
            batch_size=batch_sizes[arm],
            num_epochs=config.num_epochs,
            optim=replace(base.optim, schedule="constant"),
        )
        for arm in ARMS
    }


def split(
    rankings: Sequence[Ranking], num_prompts: int, num_held_out: int, seed: int
) -> tuple[list[Ranking], list[Ranking]]:
    """Rankings of drawn prompts to train on, and those of others to measure on.

    Raises:
        ValueError: there are fewer prompts.
    """
    keys = sorted({ranking.key for ranking in rankings})
    if len(keys) < num_prompts + num_held_out:
        raise ValueError(
            f"num_prompts {num_prompts} and num_held_out {num_held_out} need more than the "
            f"{len(keys)} prompts that there are; lower one of them"
        )
    random.Random(seed).shuffle(keys)
    trained = set(keys[:num_prompts])
    measured = set(keys[num_prompts : num_prompts + num_held_out])
    return (
        [ranking for ranking in rankings if ranking.key in trained],
        [ranking for ranking in rankings if ranking.key in measured],
    )


def shuffled_pairs(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Every pair as a ranking of two; those of a prompt weigh together what it did."""
    return [
        replace(ranking.restricted_to([i, j]), weight=ranking.weight / len(ranking.preferences()))
        for ranking in rankings
        for i, j, _ in ranking.preferences()
    ]


def is_finished(config: RewardModelConfig) -> bool:
    """A run with these settings has written its results."""
    folder = Path(config.output_dir)
    if not (folder / RESULTS).is_file():
        return False
    return yaml.safe_load((folder / CONFIG).read_text("utf-8")) == settings_in_force(config)


def read_epochs(folder: Path) -> Epochs:
    """What a run of the rm stage logged after each epoch."""
    epochs: Epochs = []
    losses: list[float] = []
    for row in read_metrics(folder / METRICS):
        if "rm/loss" in row:
            losses.append(row["rm/loss"])
        else:
            figures = {name: row[f"rm/{name}"] for name in FIGURES if f"rm/{name}" in row}
            epochs.append({"loss": fmean(losses), **figures})
            losses = []
    return epochs


def differences(epochs: Mapping[str, Sequence[Epochs]]) -> dict[str, list[dict[str, Any]]]:
    """Shuffled less grouped: figure -> after each epoch the seeds' values, mean, t interval."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in known_figures(epochs)}
    for name, rows in found.items():
        grouped, shuffled = (by_epoch(epochs[arm], name) for arm in ARMS)
        for of_grouped, of_shuffled in zip(grouped, shuffled, strict=True):
            values = [b - a for a, b in zip(of_grouped, of_shuffled, strict=True)]
            interval = list(t_interval(values))
            rows.append({"by_run": values, "mean": fmean(values), "interval": interval})
    return found


def known_figures(epochs: Mapping[str, Sequence[Epochs]]) -> list[str]:
    """Figures that the runs have; without a gold score, the last is not among them."""
    return [name for name in FIGURES if name in epochs[ARMS[0]][0][0]]


def by_epoch(runs: Sequence[Epochs], figure: str) -> list[tuple[float, ...]]:
    """The runs' values of a figure after each epoch."""
    return list(zip(*[[row[figure] for row in epochs] for epochs in runs], strict=True))


def format_table(epochs: Mapping[str, Sequence[Epochs]]) -> str:
    """Markdown: mean and standard deviation over runs, and the difference of the arms."""
    lines = [
        "| figure | epoch | grouped | shuffled | shuffled - grouped, by seed | mean (95 % t) |",
        "|---|---|---|---|---|---|",
    ]
    for name, rows in differences(epochs).items():
        columns = [by_epoch(epochs[arm], name) for arm in ARMS]
        for number, (row, *values) in enumerate(zip(rows, *columns, strict=True), start=1):
            cells = [f"{fmean(of_arm):.3f} ± {stdev(of_arm):.3f}" for of_arm in values]
            by_run = ", ".join(f"{value:+.3f}" for value in row["by_run"])
            low, high = row["interval"]
            mean = f"{row['mean']:+.3f} ({low:+.3f} to {high:+.3f})"
            label = FIGURES[name] if number == 1 else ""
            lines.append(f"| {label} | {number} | {' | '.join(cells)} | {by_run} | {mean} |")
    return "\n".join(lines)


def draw(epochs: Mapping[str, Sequence[Epochs]], path: Path) -> None:
    """A panel a figure: the runs as thin lines, their mean as a thick one."""
    names = known_figures(epochs)
    figure = Figure(figsize=(3.3 * len(names), 3.0), layout="constrained")
    panels = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _draw_panel(axes, name, epochs)
    panels[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    figure.supxlabel("epoch", fontsize=9, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _draw_panel(axes: Axes, name: str, epochs: Mapping[str, Sequence[Epochs]]) -> None:
    for arm, colour in zip(ARMS, COLOURS, strict=False):
        values = by_epoch(epochs[arm], name)
        numbers = range(1, len(values) + 1)
        for of_run in zip(*values, strict=True):
            axes.plot(numbers, of_run, color=colour, alpha=0.35, linewidth=0.8)
        means = [fmean(of_epoch) for of_epoch in values]
        axes.plot(numbers, means, color=colour, linewidth=1.8, marker="o", markersize=4, label=arm)
    what, _, unit = FIGURES[name].partition(", ")
    axes.set_title(what[0].upper() + what[1:], loc="left", fontsize=10, color=INK)
    axes.set_ylabel(unit or "share of pairs", fontsize=8, color=INK)
    axes.set_xticks(numbers)
    axes.tick_params(labelsize=8, length=2, color=INK, labelcolor=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)


if __name__ == "__main__":
    run_stage(study, Config)
