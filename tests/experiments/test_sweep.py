"""Tests the sweep: which policies it makes, and its tables."""

import json
from pathlib import Path

import pytest

from experiments.policies import Row
from experiments.sweep import (
    Config,
    find_controls,
    format_tables,
    make_policies,
    policy_config,
    sweep,
)
from stages.ppo.config import Config as PPOConfig
from tests.experiments.run_folders import ppo_config, write_evaluation, write_run


def config_of(run: str, tmp_path: Path) -> Config:
    return Config(
        runs=[run],
        ptx_coefs=[0.0, 1.0, 27.8],
        kl_coefs=[0.0, 0.05],
        output_dir=str(tmp_path / "sweep"),
        plot=str(tmp_path / "plots" / "sweep.png"),
    )


def test_a_coefficient_that_the_pipeline_took_is_not_made_again(run: str) -> None:
    assert policy_config(run, "ptx", 0.0) == ppo_config(run)
    assert policy_config(run, "kl", 0.05) == ppo_config(run)
    assert policy_config(run, "ptx", 1.0) == ppo_config(run, "ppo_ptx", ptx=1.0)


def test_a_run_that_was_moved_is_found_where_it_lies(run: str, tmp_path: Path) -> None:
    moved = str(Path(run).rename(tmp_path / "moved"))
    assert policy_config(moved, "ptx", 0.0).output_dir == f"{moved}/ppo"
    assert policy_config(moved, "ptx", 1.0).output_dir == f"{moved}/ppo_ptx"


def test_other_coefficients_change_nothing_else(run: str) -> None:
    assert policy_config(run, "ptx", 27.8) == ppo_config(run, "sweep/ptx_27.8", ptx=27.8)
    assert policy_config(run, "kl", 1.5) == ppo_config(run, "sweep/kl_1.5", kl=1.5)


@pytest.mark.slow
def test_only_missing_policies_are_trained(run: str, tmp_path: Path) -> None:
    trained = []

    def train(config: PPOConfig) -> None:
        trained.append(config.output_dir)
        write_run(config, {})

    folders = make_policies(config_of(run, tmp_path), run, [], train)
    assert trained == [f"{run}/sweep/ptx_27.8", f"{run}/sweep/kl_0"]
    assert folders["sft"] == {"SFT": f"{run}/sft"}
    assert folders["ptx"] == {
        "0": f"{run}/ppo",
        "1": f"{run}/ppo_ptx",
        "27.8": f"{run}/sweep/ptx_27.8",
    }
    assert folders["kl"] == {"0": f"{run}/sweep/kl_0", "0.05": f"{run}/ppo"}


def test_controls_count_where_every_run_has_them(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(tmp_path / "other")
    for folder in (run, other):
        write_run(ppo_config(folder, "controls/constant"), {})
    write_run(ppo_config(run, "controls/flipped"), {})
    write_run(ppo_config(other, "controls/flipped"))  # not finished
    assert find_controls([run, other]) == ["constant"]
    assert f"no finished controls/flipped in {other}" in capsys.readouterr().out


def test_differences_are_between_policies_of_one_seed() -> None:
    def row(label: str, gold: list[float]) -> Row:
        return Row(label, [{"gold_score": g, "fact_recall": 0.5, "text_loss": 1.0} for g in gold])

    rows = {
        "sft": [row("SFT", [1.0, 3.0])],
        "plain": [row("plain PPO", [2.0, 4.5])],
        "ptx": [row("0", [2.0, 4.5]), row("1", [3.0, 5.5])],
        "kl": [row("0.05", [2.0, 4.5])],
        "controls": [],
    }
    text = format_tables(["a", "b"], rows)
    means, seeds, differences = text.split("| policy |")[1:]
    # Of two values the interval's half is 12.7062 times half of their difference.
    assert "| SFT | 2.000 ± 12.706 |" in means
    assert "| SFT | 1.000, 3.000 |" in seeds
    assert "gold score - SFT | fact recall - SFT | text loss - SFT | gold score - plain" in text
    zero = "0.000 ± 0.000"
    from_sft = f"2.250 ± 3.177 | {zero} | {zero}"
    assert f"| ptx coefficient 1 | {from_sft} | 1.000 ± 0.000 | {zero} | {zero} |" in differences
    assert f"| SFT |  |  |  | -1.250 ± 3.177 | {zero} | {zero} |" in differences
    from_sft = f"1.250 ± 3.177 | {zero} | {zero}"
    assert f"0.05 | {from_sft} |  |  |  |" in differences  # it is plain PPO itself


@pytest.mark.slow
def test_the_program_writes_its_tables_and_its_plot(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.sweep.train_ppo", lambda config: write_run(config, {}))
    monkeypatch.setattr("experiments.sweep.evaluate", write_evaluation)
    config = config_of(run, tmp_path)
    sweep(config)
    results = json.loads((tmp_path / "sweep" / "results.json").read_text(encoding="utf-8"))
    # In the evaluation: sft, then the folders by name.
    places = {"ptx": {"0": 1.0, "1": 2.0, "27.8": 4.0}, "kl": {"0": 3.0, "0.05": 1.0}}
    for knob, by_coef in places.items():
        found = {coef: figures["gold_score"]["mean"] for coef, figures in results[knob].items()}
        assert found == by_coef
    assert "| ptx coefficient 27.8 | 4.000 |" in (tmp_path / "sweep" / "table.md").read_text()
    assert Path(config.plot).read_bytes().startswith(b"\x89PNG")
