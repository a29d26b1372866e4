"""python -m experiments.grouped_pairs

This study asks which reward model overfits: one trained on the pairs of a prompt together, or one
trained on shuffled pairs. With shuffled pairs "a single pass over the dataset caused the reward
model to overfit" (Ouyang et al. 2022, section 3.5). The reason is that each of K responses is then
in K - 1 steps of an epoch, not in one.

Both arms start from the same model and train on the same pairs at the same constant learning rate.
A step has the same number of pairs on average, so both arms take the same number of steps. A
shuffled pair weighs 1 / (pairs of its prompt), so both arms have the same objective and differ only
in the grouping. They are measured on the same other prompts. Only some of the prompts are trained
on: overfitting shows better with few, and a shuffled epoch costs several grouped ones.

The study takes run folders of `make pipeline`, one for each seed. It uses their rankings and the
settings of their reward model, except for what is named above.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.shared import (
    COLOURS,
    INK,
    RUNS,
    TABLE,
    mean_cell,
    over_seeds,
    read_rows,
    save_figure,
    settings_of,
    style_axes,
    values_cell,
)
from experiments.tables import markdown_table
from rlhf.inputs.files import read_records, write_records
from rlhf.inputs.ranges import PositiveInt
from rlhf.inputs.records import Ranking
from rlhf.inputs.streams import python_stream
from rlhf.runs.folder import METRICS, folders_released
from rlhf.runs.program import run_stage
from rlhf.runs.run import open_run
from rlhf.runs.settings import FolderSettings
from stages.rm.config import Config as RewardModelConfig
from stages.rm.train import train

ARMS = ("grouped", "shuffled")
FIGURES = {
    "loss": ("training loss", "nats a pair"),
    "held_out_loss": ("held-out loss", "nats a pair"),
    "held_out_accuracy": ("held-out accuracy by labels", "share of pairs"),
    "held_out_accuracy_gold": ("held-out accuracy by gold", "share of pairs"),
}
"""Maps metrics of the rm stage to name and unit. The training loss is the mean over an epoch's
steps."""

Epochs = list[dict[str, float]]
"""Holds the figures of one reward model after each epoch."""
Figures = dict[str, dict[str, list[list[float]]]]
"""Maps figure to arm to a list that has, for each epoch, the value in every run."""


@dataclass(frozen=True, kw_only=True)
class Config(FolderSettings):
    """Compare reward models trained on grouped and on shuffled pairs, over several seeds."""

    runs: list[str] = field(default_factory=lambda: list(RUNS))
    """Run folders of pipelines with a reward model, one for each seed."""
    num_prompts: PositiveInt = 400
    """Prompts to train on, drawn by the run's seed."""
    num_held_out: PositiveInt = 400
    """Other prompts to measure on, drawn by the same seed."""
    num_epochs: PositiveInt = 4
    """Passes over the pairs. Figures are taken after each."""
    output_dir: str = "runs/grouped_pairs"
    """Folder of table.md, results.json and, below the name of each run, its split and both arms."""
    plot: str = "docs/experiments/grouped_pairs.png"
    """The picture to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len({Path(run).name for run in self.runs}) < max(2, len(self.runs)):
            raise ValueError(f"runs is {self.runs}; give two or more folders of different names")


@folders_released()
def compare_groupings(config: Config) -> None:
    """Train the missing arms of every run; write table, figures and plot.

    Raises:
        ValueError: a run has too few prompts, or an arm was made with other settings.
        OSError: a run's file is missing.
    """
    record = open_run(
        config,
        stage="grouped_pairs",
        inputs={run: run for run in config.runs},
        files=(TABLE,),
        always_runs=True,
    )
    epochs: dict[str, list[Epochs]] = {arm: [] for arm in ARMS}
    for run in config.runs:
        for arm, settings in make_arms(run, config).items():
            train(settings)
            epochs[arm].append(read_epochs(Path(settings.output_dir) / METRICS))
    figures = over_runs(epochs)
    table = format_table(figures)
    (record.dir / TABLE).write_text(table, encoding="utf-8")
    draw(figures, config.plot)
    record.finish({name: summarise(*by_arm.values()) for name, by_arm in figures.items()})
    print(table)


def make_arms(run: str, config: Config) -> dict[str, RewardModelConfig]:
    """Write a run's split of the rankings for both arms; return the arms' settings."""
    base = settings_of(RewardModelConfig, f"{run}/rm")
    sizes = f"{config.num_prompts}_{config.num_held_out}_prompts"
    folder = Path(config.output_dir) / Path(run).name / sizes
    rankings = [one for source in base.rankings for one in read_records(source, Ranking)]
    grouped, held_out = split(rankings, config.num_prompts, config.num_held_out, base.seed)
    shuffled = shuffled_pairs(grouped)
    write_records(folder / "held_out.jsonl", held_out)
    pairs_of_ranking = len(shuffled) / sum(bool(ranking.preferences()) for ranking in grouped)
    arms = {}
    for arm, records, batch_size in (
        ("grouped", grouped, base.batch_size),
        ("shuffled", shuffled, round(base.batch_size * pairs_of_ranking)),
    ):
        write_records(folder / f"{arm}.jsonl", records)
        arms[arm] = replace(
            base,
            output_dir=str(folder / arm),
            rankings=[str(folder / f"{arm}.jsonl")],
            held_out=None,
            held_out_rankings=[str(folder / "held_out.jsonl")],
            max_rankings=None,
            batch_size=batch_size,
            num_epochs=config.num_epochs,
            optim=replace(base.optim, schedule="constant"),
        )
    return arms


def split(
    rankings: Sequence[Ranking], num_prompts: int, num_held_out: int, seed: int
) -> tuple[list[Ranking], list[Ranking]]:
    """Draw prompts; return their rankings to train on, and those of other prompts to measure on.

    Raises:
        ValueError: there are too few prompts.
    """
    keys = sorted({ranking.key for ranking in rankings})
    if len(keys) < num_prompts + num_held_out:
        raise ValueError(
            f"num_prompts {num_prompts} and num_held_out {num_held_out} are more than the "
            f"{len(keys)} prompts that there are; lower one of them"
        )
    drawn = python_stream(seed, "grouped pairs").sample(keys, num_prompts + num_held_out)
    trained, measured = set(drawn[:num_prompts]), set(drawn[num_prompts:])
    return (
        [ranking for ranking in rankings if ranking.key in trained],
        [ranking for ranking in rankings if ranking.key in measured],
    )


def shuffled_pairs(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Turn every pair into a ranking of two; the pairs of a ranking share its weight equally."""
    return [
        replace(ranking.restricted_to([i, j]), weight=ranking.weight / len(ranking.preferences()))
        for ranking in rankings
        for i, j, _ in ranking.preferences()
    ]


def read_epochs(path: Path) -> Epochs:
    """Read what a run of the rm stage logged after each epoch, and the epoch's training loss."""
    epochs: Epochs = []
    losses: list[float] = []
    for row in read_rows(path):
        if "rm/loss" in row:
            losses.append(row["rm/loss"])
        else:
            figures = {name: row[f"rm/{name}"] for name in FIGURES if f"rm/{name}" in row}
            epochs.append({"loss": fmean(losses), **figures})
            losses = []
    return epochs


def over_runs(epochs: dict[str, list[Epochs]]) -> Figures:
    """Arrange the figures of all runs side by side; leave gold out if there is no gold score."""
    known = [name for name in FIGURES if name in epochs[ARMS[0]][0][0]]
    return {
        name: {
            arm: [[after[name] for after in of_runs] for of_runs in zip(*epochs[arm], strict=True)]
            for arm in ARMS
        }
        for name in known
    }


def summarise(
    grouped: Sequence[Sequence[float]], shuffled: Sequence[Sequence[float]]
) -> list[dict[str, object]]:
    """Describe both arms and their difference after each epoch, as mean, interval and values."""
    return [
        {
            "epoch": number,
            "grouped": over_seeds(left),
            "shuffled": over_seeds(right),
            "difference": over_seeds(subtract(right, left)),
        }
        for number, (left, right) in enumerate(zip(grouped, shuffled, strict=True), start=1)
    ]


def subtract(values: Sequence[float], others: Sequence[float]) -> list[float]:
    return [value - other for value, other in zip(values, others, strict=True)]


def format_table(figures: Figures) -> str:
    """Format means over runs, each ± half of its 95 % t interval, and the differences by run."""
    header = ["figure", "epoch", *ARMS, "shuffled - grouped", "the same by run"]
    rows = []
    for name, by_arm in figures.items():
        for number, (left, right) in enumerate(zip(*by_arm.values(), strict=True), start=1):
            changes = subtract(right, left)
            cells = [mean_cell(values, 3) for values in (left, right, changes)]
            label = ", ".join(FIGURES[name]) if number == 1 else ""
            rows.append([label, str(number), *cells, values_cell(changes, 3)])
    return markdown_table(header, rows)


def draw(figures: Figures, path: str) -> None:
    """Draw a panel for each figure, with thin lines for the runs and a thick one for their mean."""
    num_rows = -(-len(figures) // 2)
    figure = Figure(figsize=(8.4, 3.1 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, 2, squeeze=False).ravel()
    for axes in panels[len(figures) :]:
        axes.remove()
    for axes, (name, by_arm) in zip(panels, figures.items(), strict=False):
        title, unit = FIGURES[name]
        style_axes(axes, title[0].upper() + title[1:], "epoch", unit)
        for colour, (arm, values) in zip(COLOURS, by_arm.items(), strict=False):
            _draw_arm(axes, arm, values, colour)
    panels[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    save_figure(figure, path)


def _draw_arm(axes: Axes, arm: str, values: Sequence[Sequence[float]], colour: str) -> None:
    epochs = range(1, len(values) + 1)
    axes.plot(epochs, values, color=colour, alpha=0.35, linewidth=0.8)
    means = [fmean(of_runs) for of_runs in values]
    axes.plot(epochs, means, color=colour, linewidth=1.8, marker="o", markersize=4, label=arm)
    axes.set_xticks(epochs)


def main() -> None:
    run_stage(compare_groupings, Config)


if __name__ == "__main__":
    main()
