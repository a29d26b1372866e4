"""python -m experiments.sweep

This study repeats the central ablation of Ouyang et al. 2022 (appendix E.6, figures 33 and 34). It
asks what a policy forgets while it learns to please. One sweep raises the ptx coefficient at the
preset's KL coefficient. The other raises the KL coefficient without ptx.

The study takes run folders of `make pipeline`, one for each seed, which hold plain PPO and PPO-ptx.
It makes the other policies of both sweeps in RUN/sweep, with all other settings as in RUN/ppo. One
evaluation, RUN/sweep/evaluation, measures all policies of a run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from experiments.policies import Row, evaluate_policies, figure_table
from experiments.shared import (
    COLOURS,
    DPI,
    INK,
    RUNS,
    TABLE,
    is_finished,
    mean_cell,
    save_figure,
    settings_of,
    style_axes,
    values_cell,
)
from experiments.tables import markdown_table
from rlhf.runs.folder import folders_released
from rlhf.runs.program import run_stage
from rlhf.runs.run import open_run
from rlhf.runs.settings import FolderSettings
from stages.evaluate.evaluate import evaluate
from stages.ppo.config import Config as PPOConfig
from stages.ppo.train import train as train_ppo

KNOBS = {"ptx": "ptx coefficient", "kl": "KL coefficient, without ptx"}
CONTROLS = {
    "constant": "constant reward",
    "constant_warm": "constant reward, value model first",
    "flipped": "reward with its sign flipped",
}
"""Maps folders below RUN/controls to what they are. A control is evaluated if every run has it."""
FIGURES = {
    "gold_score": ("gold score", 3),
    "win_rate_vs_sft": ("win rate against SFT", 3),
    "fact_recall": ("fact recall", 3),
    "text_loss": ("text loss", 3),
    "kl": ("KL to SFT", 2),
    "response_tokens": ("tokens", 1),
    "norm_ratio": ("ptx / PPO gradient norm", 2),
}
"""Maps the key of a policy's figure to the name in the tables and the number of digits."""
COMPARED = ("gold_score", "fact_recall", "text_loss")
PANELS = {
    "fact_recall": "fact recall, share of probes",
    "text_loss": "loss on plain text, nats a token (less is better)",
}
MARKS = (("*", INK), ("s", COLOURS[2]), ("X", COLOURS[3]), ("v", COLOURS[4]))
"""Markers and colours of SFT and of each control."""
LABEL_OFFSETS = [
    (x, y)
    for far in (1, 2)
    for x, y in ((0, 19 * far), (0, -19 * far), (34 * far, 0), (-34 * far, 0))
]
"""Places for a label, in pixels from its point, the best place first."""

Folders = dict[str, dict[str, str]]
"""Maps part (sft, plain, ptx, kl, controls) to label to the policy's folder."""


@dataclass(frozen=True, kw_only=True)
class Config(FolderSettings):
    """Sweep the ptx and the KL coefficient over the runs of several seeds."""

    runs: list[str] = field(default_factory=lambda: list(RUNS))
    """Run folders of whole pipelines with their evaluation, one for each seed."""
    ptx_coefs: list[float] = field(default_factory=lambda: [0.0, 0.3, 1.0, 3.0, 10.0, 27.8])
    """Values of ptx.coef, at the KL coefficient of RUN/ppo."""
    kl_coefs: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.5, 1.5, 5.0])
    """Values of ppo.kl_coef, with the ptx coefficient of RUN/ppo, which is 0."""
    output_dir: str = "runs/sweep"
    """Folder of table.md and results.json."""
    plot: str = "docs/experiments/ptx_and_kl_sweep.png"
    """The PNG to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("runs", "ptx_coefs", "kl_coefs"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; give at least one")


@folders_released()
def sweep(config: Config) -> None:
    """Make the missing policies, evaluate all, write tables and plot."""
    study = open_run(
        config,
        stage="sweep",
        inputs={run: run for run in config.runs},
        files=(TABLE,),
        always_runs=True,
    )
    controls = find_controls(config.runs)
    rows: dict[str, list[Row]] = {}
    for run in config.runs:
        folders = make_policies(config, run, controls, train_ppo)
        (sft,) = folders["sft"].values()
        every = [folder for by_label in folders.values() for folder in by_label.values()]
        figures = evaluate_policies(run, sft, every, f"{run}/sweep/evaluation", evaluate)
        for part, by_label in folders.items():
            part_rows = rows.setdefault(part, [Row(label, []) for label in by_label])
            for row, folder in zip(part_rows, by_label.values(), strict=True):
                row.by_run.append(figures[folder])
    tables = format_tables(config.runs, rows)
    (study.dir / TABLE).write_text(tables, encoding="utf-8")
    draw(rows, config.plot)
    study.finish(
        {part: {row.label: row.report(FIGURES) for row in lines} for part, lines in rows.items()}
    )
    print(tables)


def find_controls(runs: Sequence[str]) -> list[str]:
    """Return the controls that are finished in every run; print the names of the others."""
    found = []
    for name in CONTROLS:
        missing = [run for run in runs if not is_finished(f"{run}/controls/{name}")]
        if missing:
            print(f"sweep: no finished controls/{name} in {', '.join(missing)}; it is left out")
        else:
            found.append(name)
    return found


def make_policies(
    config: Config, run: str, controls: Sequence[str], train: Callable[[PPOConfig], object]
) -> Folders:
    """Make the policies of the sweeps, unless they are up to date; return the folders of all."""
    knobs = {"ptx": config.ptx_coefs, "kl": config.kl_coefs}
    folders: Folders = {
        "sft": {"SFT": settings_of(PPOConfig, f"{run}/ppo").policy.path},
        "plain": {"plain PPO": f"{run}/ppo"},
    }
    for knob, coefs in knobs.items():
        policies = {f"{coef:g}": policy_config(run, knob, coef) for coef in coefs}
        for policy in policies.values():
            if Path(policy.output_dir).parent == Path(run, "sweep"):  # the others are read
                train(policy)
        folders[knob] = {label: policy.output_dir for label, policy in policies.items()}
    folders["controls"] = {CONTROLS[name]: f"{run}/controls/{name}" for name in controls}
    return folders


def policy_config(run: str, knob: str, coef: float) -> PPOConfig:
    """Return the settings of RUN/ppo with another coefficient and a folder in RUN/sweep.

    If RUN/ppo or RUN/ppo_ptx has this coefficient already, its settings are returned, with the
    folder in which it lies now.
    """
    base = settings_of(PPOConfig, f"{run}/ppo")
    folder = f"{run}/sweep/{knob}_{coef:g}"
    if knob == "ptx":
        wanted = replace(base, ptx=replace(base.ptx, coef=coef), output_dir=folder)
    else:
        wanted = replace(base, ppo=replace(base.ppo, kl_coef=coef), output_dir=folder)
    for name in ("ppo", "ppo_ptx"):
        existing = settings_of(PPOConfig, f"{run}/{name}")
        if replace(existing, output_dir=folder) == wanted:
            return replace(existing, output_dir=f"{run}/{name}")
    return wanted


def format_tables(runs: Sequence[str], rows: dict[str, list[Row]]) -> str:
    """Format means with their intervals, the values of each seed, and differences by seed."""
    (plain,), (sft,) = rows["plain"], rows["sft"]
    lines = [
        sft,
        *(
            replace(row, label=f"{name} {row.label}")
            for k, name in KNOBS.items()
            for row in rows[k]
        ),
        *rows["controls"],
    ]
    return "\n".join(
        [
            f"Mean over {len(runs)} seeds ± half of its 95 % t interval:\n",
            figure_table(lines, FIGURES, mean_cell),
            f"Each seed, in the order {', '.join(runs)}:\n",
            figure_table(lines, FIGURES, values_cell),
            "Difference to another policy of the same seed, mean ± half of its 95 % t interval:\n",
            _difference_table(lines, [sft, plain]),
        ]
    )


def _difference_table(lines: Sequence[Row], references: Sequence[Row]) -> str:
    columns = [(reference, key) for reference in references for key in COMPARED]
    header = ["policy", *(f"{FIGURES[key][0]} - {other.label}" for other, key in columns)]
    return markdown_table(
        header,
        [[row.label, *(_difference_cell(row, *column) for column in columns)] for row in lines],
    )


def draw(rows: dict[str, list[Row]], path: str) -> None:
    """Draw gold score against what was kept, with a line through the coefficients of each knob."""
    figure = Figure(figsize=(11, 5.5), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (kept, label) in zip(panels, PANELS.items(), strict=True):
        for (knob, name), colour in zip(KNOBS.items(), COLOURS, strict=False):
            points = [_point(row, kept) for row in rows[knob]]
            _draw_seeds(axes, rows[knob], kept, colour)
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name, linewidth=1.6)
        for number, row in enumerate([*rows["sft"], *rows["controls"]]):
            marker, colour = MARKS[number]
            _draw_seeds(axes, [row], kept, colour)
            point = _point(row, kept)
            axes.plot(*point, marker, markersize=9, color=colour, label=row.label)
        style_axes(axes, "", label, "gold score")
    panels[-1].set_ylabel("")
    panels[-1].invert_xaxis()  # so that better is to the right in both panels
    panels[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    figure.draw_without_rendering()  # fixes the place of the axes, which labels need
    for axes, kept in zip(panels, PANELS, strict=True):
        _label_points(axes, rows, kept)
    save_figure(figure, path)


def _point(row: Row, kept: str) -> tuple[float, float]:
    return row.mean(kept), row.mean("gold_score")


def _draw_seeds(axes: Axes, rows: Sequence[Row], kept: str, colour: str) -> None:
    for row in rows:
        axes.scatter(row.values(kept), row.values("gold_score"), color=colour, s=9, alpha=0.3)


def _label_points(axes: Axes, rows: dict[str, list[Row]], kept: str) -> None:
    """Label each point with its coefficient, in the first place without points and labels."""
    labelled = [(row, knob) for knob in KNOBS for row in rows[knob]]
    centres = axes.transData.transform([_point(row, kept) for row, _ in labelled])
    taken = [tuple(centre) for centre in centres]
    colours = dict(zip(KNOBS, COLOURS, strict=False))
    for (row, knob), (x, y) in zip(labelled, centres, strict=True):
        places = [(x + dx, y + dy) for dx, dy in LABEL_OFFSETS]
        free = [place for place in places if not any(_overlap(place, other) for other in taken)]
        place = next(iter(free), places[0])
        taken.append(place)
        axes.annotate(
            row.label,
            place,
            xycoords="figure pixels",
            ha="center",
            va="center",
            fontsize=8,
            color=colours[knob],
            path_effects=[withStroke(linewidth=3, foreground="white")],
        )


def _overlap(a: tuple[float, float], b: tuple[float, float]) -> bool:
    # A label of four characters in size 8 takes about 24 by 16 pixels.
    return abs(a[0] - b[0]) < 24 and abs(a[1] - b[1]) < 16


def _difference_cell(row: Row, reference: Row, figure: str) -> str:
    if row.by_run == reference.by_run:
        return ""
    pairs = zip(row.values(figure), reference.values(figure), strict=True)
    return mean_cell([value - other for value, other in pairs], FIGURES[figure][1])


def main() -> None:
    run_stage(sweep, Config)


if __name__ == "__main__":
    main()
