"""Tests the table over seeds, and what counts as beaten and as collapsed."""

import json
from pathlib import Path
from typing import Any

import pytest

from experiments.seeds import FIGURES, Config, compare_seeds, find_faults

SFT = {
    "gold_score": 1.0,
    "fact_recall": 0.9,
    "text_loss": 0.75,
    "response_tokens": 12.0,
    "eos_rate": 1.0,
    "distinct_2": 0.4,
    "right": 0.5,
    "right_greedy": 0.75,
    "right_by_kind": {"sum": 0.5, "list": 0.25},
    "parts": {"polite": 0.0},
}
HEALTHY = {
    **SFT,
    "gold_score": 3.0,
    "win_rate_vs_sft": 0.8,
    "win_rate_vs_sft_interval": [0.75, 0.85],
    "kl": 4.0,
    "right": 0.75,
}


RIGHT = {"right_accuracy": 0.8, "right_pairs": 600}


def results_of(**changes: Any) -> dict[str, Any]:
    """Return an evaluation in which PPO-ptx differs from a healthy policy."""
    return {
        "base": SFT,
        "sft": SFT,
        "ppo": HEALTHY,
        "ppo_ptx": HEALTHY | changes,
        "rm": {"pair_accuracy_gold": 0.875, "length_baseline": 0.5, **RIGHT},
        "labelers": {"agreement": 0.75},
    }


def test_a_healthy_seed_has_no_faults() -> None:
    assert find_faults(results_of()) == []


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"win_rate_vs_sft_interval": [0.5, 0.6]}, "win rate 0.500 to 0.600"),
        ({"eos_rate": 0.4}, "0.400 of the responses end"),
        ({"distinct_2": 0.1}, "0.25 of SFT's distinct token pairs"),
        ({"response_tokens": 40.0}, "3.33 times SFT's length"),
        ({"response_tokens": 3.0}, "0.25 times SFT's length"),
        ({"kl": 60.0}, "60.0 nats from SFT"),
        ({"right": 0.25}, "right answers -0.250 from SFT"),
        ({"right_greedy": 0.625}, "right answers -0.125 from SFT when greedy"),
        ({"right_by_kind": {"sum": 0.75, "list": 0.125}}, "right answers -0.125 from SFT in list"),
    ],
)
def test_each_way_to_fail_is_named(changes: dict[str, Any], fault: str) -> None:
    assert find_faults(results_of(**changes)) == [fault]


def test_the_program_puts_seeds_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(tmp_path / "first"), str(tmp_path / "second")]
    evaluations = [results_of(), results_of(gold_score=4.0, kl=60.0)]
    for run, results in zip(runs, evaluations, strict=True):
        Path(run).mkdir()
        Path(run, "results.json").write_text(json.dumps(results))
    compare_seeds(Config(runs=runs, output_dir=str(tmp_path / "seeds")))
    text = (tmp_path / "seeds" / "table.md").read_text()
    lines = text.splitlines()
    assert lines[2] == "| first " + "| 0.500 / 0.750 " * 2 + "| 0.750 / 0.750 " * 2 + (
        "| 0.000 | 0.800 | 0.750 |"
    )
    assert "| figure | first | second | mean |" in lines
    assert len([line for line in lines if "`" in line]) == len(FIGURES)
    # Of two values the interval's half is 12.7062 times half of their difference.
    assert "(`ppo_ptx.gold_score`) | 3.000 | 4.000 | 3.500 ± 6.353 |" in text
    assert "(`ppo_ptx.win_rate_vs_sft_interval`) | 0.750-0.850 | 0.750-0.850 |  |" in text
    assert "| ppo_ptx - ppo | 0.500 ± 6.353 | 0.000 ± 0.000 | 0.000 ± 0.000 |" in text
    assert lines[-2:] == [
        f"- {runs[0]}: beats SFT, no collapse",
        f"- {runs[1]}: 60.0 nats from SFT",
    ]
    results = json.loads((tmp_path / "seeds" / "results.json").read_text())
    assert results["faults"] == {runs[0]: [], runs[1]: ["60.0 nats from SFT"]}
    assert results["ppo_ptx.gold_score"]["values"] == [3.0, 4.0]
    assert text in capsys.readouterr().out
