"""Measure all policies of a study together, and hold their figures over runs.

A study compares policies that it trained itself with those of whole pipelines, in one evaluation
for each run.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from experiments.shared import over_seeds, read_json, read_rows, settings_of
from experiments.tables import markdown_table
from rlhf.runs.folder import METRICS, RESULTS
from stages.evaluate.config import Config as EvaluateConfig

Figures = dict[str, float]
"""Holds the figures of one policy by their keys in results.json; not every policy has all."""
Columns = Mapping[str, tuple[str, int]]
"""Maps the key of a figure to its name in a table and its number of digits."""


@dataclass(frozen=True)
class Row:
    """Holds one kind of policy, which is a line of the tables and a point of the plot."""

    label: str
    by_run: list[Figures]

    def values(self, figure: str) -> list[float]:
        """Return a figure in each run; empty if this kind of policy does not have it."""
        return [figures[figure] for figures in self.by_run if figure in figures]

    def mean(self, figure: str) -> float:
        values = self.values(figure)
        return sum(values) / len(values)

    def report(self, columns: Columns) -> dict[str, object]:
        """Return each figure as results.json has it: its mean, interval and values."""
        return {key: over_seeds(values) for key in columns if (values := self.values(key))}


def evaluate_policies(
    run: str,
    sft: str,
    others: Iterable[str],
    output_dir: str,
    stage: Callable[[EvaluateConfig], object],
) -> dict[str, Figures]:
    """Measure all policies of a run together; return the figures of each by its folder.

    The settings are those of the run's own evaluation, so a policy that is in both gets the same
    figures.

    Args:
        sft: Folder of the baseline.
        others: Folders of the other policies.
        output_dir: Folder of the evaluation. It may hold one of another set of policies.
    """
    base = settings_of(EvaluateConfig, run)
    names = {folder: Path(folder).name.replace(".", "-") for folder in sorted({*others} - {sft})}
    config = replace(
        base,
        policies={"sft": sft, **{name: folder for folder, name in names.items()}},
        baseline="sft",
        reports={},
        stages={},
        output_dir=output_dir,
        overwrite=True,
    )
    stage(config)
    results = read_json(Path(output_dir) / RESULTS)
    return {
        folder: {**results[name], **_norm_ratio(folder)} for name, folder in config.policies.items()
    }


def figure_table(
    rows: Sequence[Row], columns: Columns, cell: Callable[[Sequence[float], int], str]
) -> str:
    """Format a line for each row; `cell` formats a figure's values over runs, with its digits."""
    lines = []
    for row in rows:
        figures = [(row.values(key), digits) for key, (_, digits) in columns.items()]
        lines.append([row.label, *(cell(of, digits) if of else "" for of, digits in figures)])
    return markdown_table(["policy", *(name for name, _ in columns.values())], lines)


def _norm_ratio(folder: str) -> Figures:
    """Return the mean ratio of ptx to PPO gradient norm over updates; empty without ptx."""
    ratios = [
        row["ppo/ptx_grad_norm"] / row["ppo/ppo_grad_norm"]
        for row in read_rows(Path(folder) / METRICS)
        if "ppo/ptx_grad_norm" in row
    ]
    return {"norm_ratio": sum(ratios) / len(ratios)} if ratios else {}
