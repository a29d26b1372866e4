"""Tests the benchmark stage's settings, figures and tables, as far as they need no harness."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest

from rlhf.runs.settings import load_config
from stages.benchmark.benchmark import benchmark
from stages.benchmark.config import Config, TaskSettings
from stages.benchmark.figures import Metric, alignment_tax, difference, figure
from stages.benchmark.report import format_results

SHARE = Metric(higher_is_better=True)
PERPLEXITY = Metric(False, lambda logprobs: math.exp(-sum(logprobs) / len(logprobs)))


def make_config(**changes: Any) -> Config:
    settings = {
        "policies": {"base": "base", "sft": "sft"},
        "tasks": {"piqa": TaskSettings()},
        "output_dir": "out",
    }
    return Config(**{**settings, **changes})


def test_a_share_gets_wilsons_interval() -> None:
    # Wilson's interval of 2 successes in 4 is 0.5 +- 0.349961 (Wilson 1927, with z = 1.959964).
    found = figure([[1.0], [0.0], [True], [False]], SHARE, seed=0)
    assert found["value"] == 0.5
    assert found["interval"] == pytest.approx((0.150039, 0.849961), abs=1e-5)
    assert found["error"] == pytest.approx(math.sqrt(1 / 3) / 2)


def test_a_question_with_several_draws_counts_once() -> None:
    # Means 1 and 0.5; the four values together would have the mean 0.6.
    found = figure([[1.0], [0.0, 1.0, 0.0, 1.0]], SHARE, seed=0)
    assert found["value"] == 0.75
    assert found["interval"] == (0.5, 1.0)


def test_a_perplexity_is_put_together_by_the_harness_function() -> None:
    found = figure([[math.log(1 / 2)], [math.log(1 / 8)]], PERPLEXITY, seed=0)
    assert found["value"] == pytest.approx(4.0)
    assert found["interval"] == pytest.approx((2.0, 8.0))
    assert "error" not in found


@pytest.mark.parametrize(
    ("metric", "sign", "verdict"),
    [
        (SHARE, 1, "better"),
        (SHARE, -1, "worse"),
        (PERPLEXITY, 1, "better"),
        (PERPLEXITY, -1, "worse"),
    ],
)
def test_the_verdict_knows_which_way_is_up(metric: Metric, sign: int, verdict: str) -> None:
    baseline = [[-1.0 - i % 3] for i in range(40)]
    values = [[value + sign * 0.5] for (value,) in baseline]
    found = difference(values, baseline, metric, seed=0)
    assert found["verdict"] == verdict
    low, high = found["interval"]
    assert low * high > 0
    if metric is SHARE:
        assert found["difference"] == pytest.approx(0.5 * sign)


def test_no_verdict_where_the_interval_has_zero() -> None:
    found = difference([[1.0], [0.0], [1.0]], [[0.0], [1.0], [1.0]], SHARE, seed=0)
    assert found["difference"] == 0.0
    assert found["verdict"] == ""


def test_every_policy_is_compared_with_every_baseline_that_was_measured() -> None:
    values = {"base": [[0.0], [0.0]], "sft": [[1.0], [1.0]], "ppo": [[1.0], [1.0]]}
    rows = alignment_tax(values, ["base", "sft", "absent"], SHARE, seed=0)
    assert [(row["policy"], row["baseline"], row["difference"]) for row in rows] == [
        ("sft", "base", 1.0),
        ("ppo", "base", 1.0),
        ("base", "sft", -1.0),
        ("ppo", "sft", 0.0),
    ]


RESULTS = {
    "policies": ["base", "sft"],
    "baselines": ["base"],
    "engine": "packed",
    "tasks": {"piqa": {"source": "piqa.yaml", "questions": 30}},
    "figures": [
        {"policy": policy, "task": "piqa", "rendering": "plain", "shots": shots, "metric": "acc"}
        | {"value": value, "interval": [value - 0.125, value + 0.125]}
        for policy, shots, value in [("base", 0, 0.5), ("sft", 0, 0.75), ("base", 4, 0.625)]
    ],
    "tax": [
        {"policy": "sft", "task": "piqa", "rendering": "plain", "shots": 0, "metric": "acc"}
        | {"baseline": "base", "difference": 0.25, "interval": [0.0625, 0.4375]}
        | {"verdict": "better"}
    ],
    "cpu_seconds": [{"policy": "base", "seconds": 2.25}, {"policy": "base", "seconds": 1.0}],
}


def test_tables_show_figures_differences_and_curves() -> None:
    lines = format_results(RESULTS).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if "|" in line]
    assert ["piqa", "plain", "0", "acc", "0.500 (0.375, 0.625)", "0.750 (0.625, 0.875)"] in cells
    assert ["piqa", "plain", "4", "acc", "0.625 (0.500, 0.750)", "-"] in cells
    assert ["piqa", "plain", "0", "acc", "+0.250 (0.062, 0.438) better"] in cells
    curve = ["base", "piqa", "plain", "acc", "0.500 (0.375, 0.625)", "0.625 (0.500, 0.750)"]
    assert curve in cells
    assert "- CPU seconds, engine packed: base 3" in lines
    assert len({len(line) for line in lines if line.startswith("| piqa ")}) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policies": {}}, "policies is empty"),
        ({"tasks": {}}, "tasks is empty"),
        ({"baselines": ["sfd"]}, "baselines has 'sfd'; give some of the policies base, sft"),
        ({"plain_only": ["b"]}, "plain_only has 'b'"),
        ({"limit": 1}, "limit is 1; give a number: 2 or more, or null"),
        ({"num_shot_questions": 0}, "num_shot_questions is 0"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"shots": []}, "shots is \\[\\]; give different numbers"),
        ({"shots": [-1]}, "shots is \\[-1\\]; give different numbers"),
        ({"shots": [1, 1]}, "give different numbers of 0 or more"),
        ({"renderings": []}, "renderings is empty; give plain, chat or both"),
        ({"draws": 2, "samples": 2}, "draws is 2 and samples is 2"),
    ],
)
def test_ways_of_putting_a_task_that_cannot_be(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskSettings(**words)


def test_a_task_in_a_settings_file_keeps_the_defaults_that_it_does_not_name() -> None:
    config = load_config(
        Config,
        ["--policies.a", "x", "--tasks", "{piqa: {shots: [0, 5]}}", "--output_dir", "out"],
    )
    assert config.tasks == {"piqa": TaskSettings(shots=[0, 5])}
    assert config.baseline_names == ["a"]


def test_without_the_harness_the_error_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = importlib.import_module

    def fail(name: str) -> Any:
        if name == "lm_eval":
            raise ImportError("No module named 'lm_eval'")
        return real(name)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(ValueError, match=r"pip install -c constraints.txt -e '.\[eval\]'"):
        benchmark(make_config(task_dir=str(tmp_path), output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
