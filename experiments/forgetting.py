"""python -m experiments.forgetting

This study asks how far PPO must go before the policy forgets what only the pretraining text told,
and whether the pretraining mix keeps it (Ouyang et al. 2022, section 4.2 and appendix E.6).

The study takes run folders of `make pipeline`, one for each seed, which hold plain PPO and PPO-ptx.
It trains both again in RUN/forgetting, for other numbers of updates and without the KL penalty. All
other settings stay. One evaluation, RUN/forgetting/evaluation, measures all policies of a run.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from matplotlib.figure import Figure

from experiments.policies import Row, evaluate_policies, figure_table
from experiments.shared import (
    COLOURS,
    DPI,
    INK,
    RUNS,
    TABLE,
    mean_cell,
    save_figure,
    settings_of,
    style_axes,
    values_cell,
)
from rlhf.runs.folder import folders_released
from rlhf.runs.program import run_stage
from rlhf.runs.run import open_run
from rlhf.runs.settings import FolderSettings
from stages.evaluate.evaluate import evaluate
from stages.ppo.config import Config as PPOConfig
from stages.ppo.train import train as train_ppo

FIGURES = {
    "fact_recall": ("fact recall", 3),
    "text_loss": ("text loss", 3),
    "kl": ("KL to SFT", 2),
    "gold_score": ("gold score", 2),
    "right": ("right answers", 3),
}
"""Maps the key of a policy's figure to the name in the tables and the number of digits."""
PANELS = {
    "fact_recall": "fact recall, share of probes",
    "text_loss": "loss on plain text, nats a token",
    "right": "right answers to held-out prompts, share",
}


@dataclass(frozen=True, kw_only=True)
class Config(FolderSettings):
    """Train PPO with and without mix and KL penalty for several numbers of updates."""

    runs: list[str] = field(default_factory=lambda: list(RUNS))
    """Run folders of whole pipelines with their evaluation, one for each seed."""
    num_updates: list[int] = field(default_factory=lambda: [24, 96])
    """Numbers of updates. What RUN/ppo and RUN/ppo_ptx have already is not made again."""
    output_dir: str = "runs/forgetting"
    """Folder of table.md and results.json."""
    plot: str = "docs/experiments/forgetting.png"
    """The PNG to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("runs", "num_updates"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")


@dataclass(frozen=True)
class Recipe:
    """Says how a policy is trained from SFT."""

    has_mix: bool
    has_penalty: bool

    @property
    def label(self) -> str:
        return ("PPO-ptx" if self.has_mix else "PPO") + ("" if self.has_penalty else ", no penalty")

    def settings(self, run: str, num_updates: int) -> PPOConfig:
        """Return the settings of a policy; its folder is RUN/ppo or RUN/ppo_ptx if it is that."""
        source = f"{run}/ppo_ptx" if self.has_mix else f"{run}/ppo"
        base = replace(settings_of(PPOConfig, source), output_dir=source)
        coef = base.ppo.kl_coef if self.has_penalty else 0.0
        wanted = replace(base, num_updates=num_updates, ppo=replace(base.ppo, kl_coef=coef))
        if wanted == base:
            return base
        name = f"{Path(source).name}_{num_updates}_kl_{coef:g}"
        return replace(wanted, output_dir=f"{run}/forgetting/{name}")


RECIPES = tuple(
    Recipe(has_mix=has_mix, has_penalty=has_penalty)
    for has_penalty in (True, False)
    for has_mix in (False, True)
)
Rows = dict[tuple[Recipe, int], Row]
"""Maps recipe and number of updates to the figures of that policy."""


@folders_released()
def study(config: Config) -> None:
    """Make the missing policies, evaluate all, write the table and the plot."""
    record = open_run(
        config,
        stage="forgetting",
        inputs={run: run for run in config.runs},
        files=(TABLE,),
        always_runs=True,
    )
    sft = Row("SFT", [])
    rows: Rows = {
        (recipe, number): Row(f"{recipe.label}, {number} updates", [])
        for recipe in RECIPES
        for number in config.num_updates
    }
    for run in config.runs:
        folders = dict(make_policies(run, rows, train_ppo))
        base = settings_of(PPOConfig, f"{run}/ppo").policy.path
        together = f"{run}/forgetting/evaluation"
        figures = evaluate_policies(run, base, folders.values(), together, evaluate)
        sft.by_run.append(figures[base])
        for key, folder in folders.items():
            rows[key].by_run.append(figures[folder])
    lines = [sft, *rows.values()]
    table = format_tables(config.runs, lines)
    (record.dir / TABLE).write_text(table, encoding="utf-8")
    draw(sft, rows, config.plot)
    record.finish({line.label: line.report(FIGURES) for line in lines})
    print(table)


def make_policies(
    run: str, keys: Iterable[tuple[Recipe, int]], train: Callable[[PPOConfig], object]
) -> Iterator[tuple[tuple[Recipe, int], str]]:
    """Yield each key with its policy's folder, after training it if it is not of the pipeline."""
    for recipe, number in keys:
        settings = recipe.settings(run, number)
        if Path(settings.output_dir).parent != Path(run):
            train(settings)
        yield (recipe, number), settings.output_dir


def format_tables(runs: Sequence[str], lines: Sequence[Row]) -> str:
    """Format means with their intervals, then the values of each seed."""
    return "\n".join(
        [
            f"Mean over {len(runs)} seeds ± half of its 95 % t interval:\n",
            figure_table(lines, FIGURES, mean_cell),
            f"Each seed, in the order {', '.join(runs)}:\n",
            figure_table(lines, FIGURES, values_cell),
        ]
    )


def draw(sft: Row, rows: Rows, path: str) -> None:
    """Draw each panel's figure against the number of updates, with a line for each recipe."""
    figure = Figure(figsize=(13, 4.2), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for axes, (key, label) in zip(panels, PANELS.items(), strict=True):
        for number, recipe in enumerate(RECIPES):
            points = {0: sft} | {n: row for (of, n), row in rows.items() if of == recipe}
            style = "-" if recipe.has_penalty else "--"
            updates = sorted(points)
            axes.plot(
                updates,
                [points[n].mean(key) for n in updates],
                style,
                marker="o",
                color=COLOURS[number],
                label=recipe.label,
                linewidth=1.6,
            )
            for n in updates:
                values = points[n].values(key)
                axes.scatter([n] * len(values), values, color=COLOURS[number], s=9, alpha=0.3)
        style_axes(axes, "", "updates", label)
    panels[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    save_figure(figure, path)


def main() -> None:
    run_stage(study, Config)


if __name__ == "__main__":
    main()
