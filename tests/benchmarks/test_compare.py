from pathlib import Path

import pytest

from benchmarks.compare import (
    UnequalWork,
    check_same_work,
    make_row,
    median_phases,
    median_ratio,
)
from benchmarks.report import check_row, markdown, write
from benchmarks.workload import Workload

RANKING = Workload(
    name="rm_k2",
    kind="rm",
    policy="p",
    reward_model="r",
    prompts=[[1, 2]],
    responses=[[[3], [4]]],
)
EPISODES = Workload(
    name="ppo_fp32", kind="ppo", policy="p", reward_model="r", prompts=[[1, 2]], new_tokens=3
)
GOOD = {"new_tokens": 3, "ratio": 1.0, "score": 0.5, "value_loss": 0.25}


def test_median_of_ratios_is_not_the_ratio_of_medians() -> None:
    # The machine is slow in the first pair: 40/20, 9/3, 5/1 -> 2, 3, 5; the medians give 9/3 = 3 by
    # chance, without the last pair 2.5 against 24.5/11.5.
    assert median_ratio([40.0, 9.0, 5.0], [20.0, 3.0, 1.0]) == 3.0
    assert median_ratio([40.0, 9.0], [20.0, 3.0]) == 2.5


def test_median_of_every_phase() -> None:
    samples = [{"phases": {"a": seconds, "b": 1.0}} for seconds in (3.0, 1.0, 2.0)]
    assert median_phases(samples) == {"a": 2.0, "b": 1.0}
    assert median_phases([{}]) == {}


def test_equal_losses_pass() -> None:
    checked = check_same_work(RANKING, {"loss": 0.7}, {"loss": 0.700009})
    assert checked == {"loss": [0.7, 0.700009]}


@pytest.mark.parametrize("loss", [0.70002, float("nan")])
def test_unequal_losses_are_refused_with_both_values(loss: float) -> None:
    with pytest.raises(UnequalWork, match=rf"rm_k2: the first loss is 0\.7 .* {loss}"):
        check_same_work(RANKING, {"loss": 0.7}, {"loss": loss})


def test_equal_updates_pass() -> None:
    assert check_same_work(EPISODES, GOOD, GOOD)["score"] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("figure", "value", "message"),
    [
        ("new_tokens", 2, "theirs 2; 3 were to be"),
        ("ratio", 1.01, "first ratio of theirs is 1.01"),
        ("score", 0.501, "the first score is 0.5 with ours and 0.501"),
        ("value_loss", 0.2502, "the first value_loss is 0.25 with ours and 0.2502"),
    ],
)
def test_unequal_updates_are_refused(figure: str, value: float, message: str) -> None:
    with pytest.raises(UnequalWork, match=message):
        check_same_work(EPISODES, GOOD, GOOD | {figure: value})


def test_equal_but_wrong_lengths_are_refused() -> None:
    wrong = GOOD | {"new_tokens": 2}
    with pytest.raises(UnequalWork, match="3 were to be"):
        check_same_work(EPISODES, wrong, wrong)


def row(name: str = "ppo_fp32") -> dict:
    ours = [
        {"seconds": 1.0, "peak_bytes": 20, "phases": {"train": 0.5}},
        {"seconds": 2.0, "peak_bytes": 30, "phases": {"train": 1.5}},
    ]
    theirs = [{"seconds": 4.0, "peak_bytes": 60}, {"seconds": 6.0, "peak_bytes": 50}]
    facts = {"ours": {"settings": "a"}, "theirs": {"settings": "b"}}
    made = make_row(EPISODES, {"ours": ours, "theirs": theirs}, facts, {"ratio": [1.0, 1.0]})
    circumstances = {"machine": {"device": "m", "threads": 2}, "commit": "c", "date": "d"}
    return made | circumstances | {"name": name}


def test_a_row_has_ratios_and_the_samples_they_are_made_of() -> None:
    made = row()
    check_row(made)
    assert made["time_ratio"] == 3.5  # the median of 4 / 1 and 6 / 2
    assert made["memory_ratio"] == 0.5  # 30 / 60, the peaks over all samples
    assert made["ours"]["seconds"] == [1.0, 2.0]
    assert made["ours"]["tokens_per_second"] == pytest.approx(5 / 1.5)
    assert made["ours"]["phases"] == {"train": 1.0}
    assert made["theirs"]["phases"] == {}


def test_a_row_without_its_samples_is_refused() -> None:
    made = row()
    made["theirs"] = made["theirs"] | {"seconds": []}
    with pytest.raises(AssertionError):
        check_row(made)


def test_rows_of_a_later_run_take_the_place_of_their_namesakes(tmp_path: Path) -> None:
    write([row("ppo_eos"), row("rm_k9")], tmp_path)
    write([row("ppo_eos") | {"time_ratio": 9.87}], tmp_path)
    table = (tmp_path / "results.md").read_text()
    assert table.index("| rm_k9 |") < table.index("| ppo_eos |")  # in the targets' order
    assert "| 9.87 |" in table
    assert table.count("| ppo_eos | ") == 3  # once in each of the three tables


def test_the_table_shows_ratios_phases_and_settings() -> None:
    table = markdown([row()])
    assert "| ppo_fp32 | 3.50 | 3.00-4.00 (2) | 0.50 |" in table
    assert "| ppo_fp32 | train 1.00 |" in table
    assert "| ppo_fp32 | a | b |" in table
    assert "m, 2 threads, commit c, d" in table
