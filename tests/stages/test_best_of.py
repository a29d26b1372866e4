"""Tests best-of-n next to the policies: figures worked by hand, and the stage itself."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stages.evaluate.best_of import Pool, best_of_curve, best_of_figures
from stages.evaluate.config import Config
from stages.evaluate.report import format_results

POOL = Pool(
    scores={"gold": [[5.0, 1.0, 3.0], [0.0, 4.0, 4.0]], "rm": [[0.0, 1.0, 2.0], [7.0, 3.0, 3.0]]},
    tokens=[[2.0, 4.0, 9.0], [6.0, 6.0, 6.0]],
    parts=[
        [{"correct": 1.0}, {"correct": 0.0}, {"correct": 1.0}],
        [{"polite": 1.0}, {"polite": 0.0}, {"polite": 0.0}],
    ],
)
ANSWERS = {"gold": [[3.0], [2.0]], "rm": [[1.0], [7.0]]}


def figures(n: int = 2, chooser: str = "rm") -> dict[str, Any]:
    right = ("correct", [[0.0], []])
    return best_of_figures(
        POOL, n, chooser, "sft", ANSWERS, right=right, kinds=["sum", "list"], seed=0
    )


def test_the_best_of_two_among_three_is_the_mean_over_the_three_pairs() -> None:
    """In the first prompt the reward model picks the responses at the places 1, 2 and 2.

    In the second it picks 0, 0, and either of the two with equal scores.
    """
    found = figures()
    assert found["rm_score"] == pytest.approx(((1 + 2 + 2) / 3 + (7 + 7 + 3) / 3) / 2)
    assert found["gold_score"] == pytest.approx(((1 + 3 + 3) / 3 + (0 + 0 + 4) / 3) / 2)
    assert found["response_tokens"] == pytest.approx(((4 + 9 + 9) / 3 + 6) / 2)
    assert found["kl"] == pytest.approx(math.log(2) - 1 / 2)
    assert "kl_error" not in found


def test_wins_and_gains_are_against_answers_outside_the_pool() -> None:
    found = figures()
    # By gold the picks are below 3, 3 and 3, against 3, and then 0, 0 and 4, against 2.
    assert found["win_rate_vs_sft"] == pytest.approx(((0 + 0.5 + 0.5) / 3 + (0 + 0 + 1) / 3) / 2)
    assert found["win_rate_vs_sft_by_rm"] == pytest.approx((2.5 / 3 + 1 / 3) / 2)
    assert found["gold_gain_vs_sft"] == pytest.approx(((7 / 3 - 3) + (4 / 3 - 2)) / 2)
    low, high = found["gold_gain_vs_sft_interval"]
    assert low <= found["gold_gain_vs_sft"] <= high


def test_parts_count_only_where_a_prompt_asks_for_them() -> None:
    found = figures()
    assert found["parts"] == {
        "correct": pytest.approx((0 + 1 + 1) / 3),
        "polite": pytest.approx((1 + 1 + 0) / 3),
    }
    assert found["right"] == found["parts"]["correct"]
    assert found["right_by_kind"] == {"sum": found["right"]}
    assert found["right_gain_vs_sft"] == pytest.approx(2 / 3)


def test_gold_may_choose_too() -> None:
    assert figures(3, "gold")["gold_score"] == pytest.approx((5 + 4) / 2)


def test_the_curve_doubles_and_ends_at_n() -> None:
    curve = best_of_curve(POOL, 3, "rm")
    assert list(curve) == ["1", "2", "3"]
    assert curve["1"] == {
        "kl": 0.0,
        "gold_score": pytest.approx((3 + 8 / 3) / 2),
        "rm_score": pytest.approx((1 + 13 / 3) / 2),
    }
    assert curve["2"]["gold_score"] == pytest.approx(figures()["gold_score"])
    assert curve["3"]["rm_score"] == pytest.approx((2 + 7) / 2)
    assert list(best_of_curve(POOL, 2, "rm")) == ["1", "2"]


def config(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "policies": {"sft": "s"},
        "prompts": "p",
        "output_dir": "o",
        "reward_model": "r",
    }
    return Config(**settings | changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"best_of": 1}, "best_of is 1.*2 or more"),
        ({"best_of_samples": 8}, "best_of_samples is 8 but best_of is null"),
        ({"best_of": 8, "best_of_samples": 4}, "best_of_samples is 4, fewer than best_of 8"),
        ({"best_of": 8, "reward_model": None}, "best_of_judge 'rm', which is not given.*none"),
        (
            {"best_of": 8, "best_of_judge": "ada", "gold": "a:b"},
            "best_of_judge 'ada'.*the judges are: gold, rm",
        ),
        ({"best_of": 8, "policies": {"best_of_8": "s"}}, "best_of 8 is called best_of_8"),
        ({"best_of": 8, "reports": {"best_of_8": "s"}}, "best_of 8 is called best_of_8"),
        ({"policies": {"best_of": "s"}}, "policies has the name 'best_of'"),
    ],
)
def test_settings_that_contradict_each_other_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        config(**changes)
    config(best_of=8, best_of_samples=8)


def test_the_table_has_a_column_for_it(tmp_path: Path) -> None:
    results = {
        "policies": ["sft"],
        "baseline": "sft",
        "judge": "gold",
        "judges": ["gold"],
        "prompts": {"used": 2, "samples_per_prompt": 1, "temperature": 1.0},
        "sft": {"gold_score": 1.5},
        "best_of": {"name": "best_of_2", "n": 2, "by_n": {}},
        "best_of_2": figures(),
        "seconds": {"evaluate": 1.0},
    }
    table = format_results(json.loads(json.dumps(results))).splitlines()
    (head,) = [line for line in table if "best_of_2" in line]
    assert head.split() == ["sft", "best_of_2"]
    (row,) = [line for line in table if line.startswith("gold score ")]
    assert row.split()[-2:] == ["1.500", f"{figures()['gold_score']:.3f}"]
    assert not any("Report: best_of" in line for line in table)


def test_replacing_the_reward_model_by_a_judge_is_allowed() -> None:
    assert replace(config(best_of=4), best_of_judge="gold", gold="a:b").best_of_name == "best_of_4"
