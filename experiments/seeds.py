"""python -m experiments.seeds

This study asks how reliable PPO-ptx is. It puts the figures of all runs side by side: of several
seeds, or of one seed on several processors. It says which runs beat SFT beyond the uncertainty of
their prompts, which knew less afterwards, and which collapsed by the limits of PPO's monitor. It
reads the evaluation in each run folder and trains nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.shared import TABLE, mean_cell, over_seeds, read_json
from experiments.tables import markdown_table
from rlhf.runs.folder import RESULTS, folders_released
from rlhf.runs.program import run_stage
from rlhf.runs.run import open_run
from rlhf.runs.settings import FolderSettings
from stages.ppo.config import MonitorSettings

FIGURES = {
    "base.right": ("base: right answers, sampled", 3),
    "sft.right": ("SFT: right answers, sampled", 3),
    "ppo.right": ("PPO: right answers, sampled", 3),
    "ppo_ptx.right": ("PPO-ptx: right answers, sampled", 3),
    "sft.right_greedy": ("SFT: right answers, greedy", 3),
    "ppo.right_greedy": ("PPO: right answers, greedy", 3),
    "ppo_ptx.right_greedy": ("PPO-ptx: right answers, greedy", 3),
    "ppo_ptx.parts.polite": ("PPO-ptx: polite", 3),
    "rm.right_accuracy": ("RM: right before wrong, in samples of SFT alike in all else", 3),
    "rm.right_pairs": ("pairs of that", 0),
    "sft.eos_rate": ("SFT: responses that end", 3),
    "rm.pair_accuracy_gold": ("RM: pairs ordered as gold does", 3),
    "rm.length_baseline": ("the same by length alone", 3),
    "labelers.agreement": ("agreement of two labelers", 3),
    "ppo.win_rate_vs_sft": ("PPO: win rate against SFT (gold)", 3),
    "ppo_ptx.win_rate_vs_sft": ("PPO-ptx: win rate against SFT (gold)", 3),
    "ppo_ptx.win_rate_vs_sft_interval": ("its 95 % interval", 3),
    "sft.gold_score": ("gold score: SFT", 3),
    "ppo.gold_score": ("gold score: PPO", 3),
    "ppo_ptx.gold_score": ("gold score: PPO-ptx", 3),
    "sft.fact_recall": ("fact recall: SFT", 3),
    "ppo.fact_recall": ("fact recall: PPO", 3),
    "ppo_ptx.fact_recall": ("fact recall: PPO-ptx", 3),
    "sft.text_loss": ("text loss: SFT", 3),
    "ppo.text_loss": ("text loss: PPO", 3),
    "ppo_ptx.text_loss": ("text loss: PPO-ptx", 3),
    "ppo.kl": ("KL to SFT: PPO", 3),
    "ppo_ptx.kl": ("KL to SFT: PPO-ptx", 3),
    "sft.response_tokens": ("tokens a response: SFT", 2),
    "ppo.response_tokens": ("tokens a response: PPO", 2),
    "ppo_ptx.response_tokens": ("tokens a response: PPO-ptx", 2),
    "ppo_ptx.eos_rate": ("PPO-ptx: responses that end", 3),
    "sft.distinct_2": ("distinct token pairs: SFT", 3),
    "ppo_ptx.distinct_2": ("distinct token pairs: PPO-ptx", 3),
}
"""Maps a path in results.json to the name in the table and the number of digits."""
JUDGED = "ppo_ptx"
COMPARED = {"gold_score": "gold score", "fact_recall": "fact recall", "text_loss": "text loss"}
OVERVIEW = {
    "base": ("base.right", "base.right_greedy"),
    "SFT": ("sft.right", "sft.right_greedy"),
    "PPO": ("ppo.right", "ppo.right_greedy"),
    "PPO-ptx": ("ppo_ptx.right", "ppo_ptx.right_greedy"),
    "polite": ("ppo_ptx.parts.polite",),
    "RM, right before wrong": ("rm.right_accuracy",),
    "labelers agree": ("labelers.agreement",),
}
"""Columns of the table with a line for each run, and the paths of what stands in them."""
MOST_LOST = 0.05
"""Share of right answers that PPO-ptx may lose to SFT in one kind of task before it is a fault."""
PAIRS = (("ppo", "sft"), ("ppo_ptx", "sft"), ("ppo_ptx", "ppo"))


@dataclass(frozen=True, kw_only=True)
class Config(FolderSettings):
    """Compare PPO-ptx over the runs of several seeds, from their evaluations."""

    runs: list[str] = field(
        default_factory=lambda: ["runs/tiny", *(f"runs/tiny-seed{seed}" for seed in range(1, 5))]
    )
    """Run folders of whole pipelines with their evaluation, one for each seed."""
    output_dir: str = "runs/seeds"
    """Folder of table.md and results.json."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.runs:
            raise ValueError("runs is empty; give at least one")


@folders_released()
def compare_seeds(config: Config) -> None:
    """Write the table, and the faults of each seed."""
    record = open_run(
        config,
        stage="seeds",
        inputs={run: run for run in config.runs},
        files=(TABLE,),
        always_runs=True,
    )
    results = [read_json(Path(run) / RESULTS) for run in config.runs]
    faults = {run: find_faults(of) for run, of in zip(config.runs, results, strict=True)}
    lines = [f"- {run}: {'; '.join(of) or 'beats SFT, no collapse'}" for run, of in faults.items()]
    tables = [
        format_overview(config.runs, results),
        format_table(config.runs, results),
        format_differences(results),
    ]
    text = "\n".join([*tables, *lines, ""])
    (record.dir / TABLE).write_text(text, encoding="utf-8")
    figures = {key: [find(of, key) for of in results] for key in FIGURES}
    numbers = {key: of for key, of in figures.items() if not isinstance(of[0], list)}
    record.finish({**{key: over_seeds(of) for key, of in numbers.items()}, "faults": faults})
    print(text)


def find_faults(results: Mapping[str, Any]) -> list[str]:
    """Find why PPO-ptx does not beat SFT in this evaluation, or how it collapsed; empty if well."""
    limits = MonitorSettings()
    sft, policy = results["sft"], results[JUDGED]
    low, high = policy["win_rate_vs_sft_interval"]
    eos_rate, kl = policy["eos_rate"], policy["kl"]
    distinct = policy["distinct_2"] / sft["distinct_2"]
    length = policy["response_tokens"] / sft["response_tokens"]
    gained = policy["right"] - sft["right"]
    greedy = policy["right_greedy"] - sft["right_greedy"]
    by_kind = {
        kind: share - sft["right_by_kind"][kind] for kind, share in policy["right_by_kind"].items()
    }
    worst = min(by_kind, key=lambda kind: by_kind[kind])
    checks = {
        f"right answers {gained:+.3f} from SFT": gained > 0,
        f"right answers {greedy:+.3f} from SFT when greedy": greedy >= 0,
        f"right answers {by_kind[worst]:+.3f} from SFT in {worst}": by_kind[worst] >= -MOST_LOST,
        f"win rate {low:.3f} to {high:.3f}": low > 0.5,
        f"{eos_rate:.3f} of the responses end": eos_rate >= limits.min_eos_rate,
        f"{distinct:.2f} of SFT's distinct token pairs": distinct >= limits.min_distinct,
        f"{length:.2f} times SFT's length": max(length, 1 / length) <= limits.max_length_change,
        f"{kl:.1f} nats from SFT": kl <= limits.max_kl,
    }
    return [fault for fault, is_well in checks.items() if not is_well]


def format_overview(runs: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """Format a line for each run; right answers are given sampled / greedy."""
    rows = [
        [
            Path(run).name,
            *(" / ".join(f"{find(of, key):.3f}" for key in keys) for keys in OVERVIEW.values()),
        ]
        for run, of in zip(runs, results, strict=True)
    ]
    return markdown_table(["run", *OVERVIEW], rows)


def format_table(runs: Sequence[str], results: Sequence[Mapping[str, Any]]) -> str:
    """Format a line for each figure, a column for each run, and mean ± half of the 95 % t
    interval."""
    header = ["figure", *(Path(run).name for run in runs), "mean"]
    rows = []
    for key, (label, digits) in FIGURES.items():
        values = [find(of, key) for of in results]
        if isinstance(values[0], list):
            cells = ["-".join(f"{end:.{digits}f}" for end in interval) for interval in values]
            rows.append([f"{label} (`{key}`)", *cells, ""])
        else:
            cells = [f"{value:.{digits}f}" for value in values]
            rows.append([f"{label} (`{key}`)", *cells, mean_cell(values, digits)])
    return markdown_table(header, rows)


def format_differences(results: Sequence[Mapping[str, Any]]) -> str:
    """Format differences of policies on the same seed, as mean ± half of the 95 % t interval."""
    rows = []
    for policy, other in PAIRS:
        differences = {
            figure: [of[policy][figure] - of[other][figure] for of in results]
            for figure in COMPARED
        }
        rows.append([f"{policy} - {other}", *(mean_cell(of, 3) for of in differences.values())])
    return markdown_table(["difference", *COMPARED.values()], rows)


def find(results: Mapping[str, Any], key: str) -> Any:
    """Return the value at part.name or part.section.name in results.json."""
    found: Any = results
    for name in key.split("."):
        found = found[name]
    return found


def main() -> None:
    run_stage(compare_seeds, Config)


if __name__ == "__main__":
    main()
