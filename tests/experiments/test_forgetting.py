"""Tests the study of forgetting: which policies it makes, its table and its plot."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.forgetting import RECIPES, Config, Recipe, make_policies, study
from stages.ppo.config import Config as PPOConfig
from tests.experiments.run_folders import ppo_config, write_evaluation, write_run


def test_policy_of_the_pipeline_is_not_made_again(run: str) -> None:
    assert Recipe(has_mix=False, has_penalty=True).settings(run, 7) == ppo_config(run)
    with_mix = Recipe(has_mix=True, has_penalty=True).settings(run, 7)
    assert with_mix == ppo_config(run, "ppo_ptx", ptx=1.0)


def test_recipes_change_the_updates_and_the_penalty_alone(run: str) -> None:
    longer = Recipe(has_mix=True, has_penalty=True).settings(run, 96)
    expected = ppo_config(run, "forgetting/ppo_ptx_96_kl_0.05", ptx=1.0)
    assert longer == replace(expected, num_updates=96)
    free = Recipe(has_mix=False, has_penalty=False).settings(run, 7)
    assert free == ppo_config(run, "forgetting/ppo_7_kl_0", kl=0.0)


def test_only_missing_policies_are_trained(run: str) -> None:
    trained: list[PPOConfig] = []
    keys = [(recipe, number) for recipe in RECIPES for number in (7, 96)]
    folders = dict(make_policies(run, keys, trained.append))
    assert list(folders) == keys
    names = {Path(folder).name for folder in folders.values()}
    assert len(names) == 8
    assert {Path(policy.output_dir).name for policy in trained} == names - {"ppo", "ppo_ptx"}


@pytest.mark.slow
def test_the_program_writes_its_tables_and_its_plot(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("experiments.forgetting.train_ppo", lambda config: write_run(config, {}))
    monkeypatch.setattr("experiments.forgetting.evaluate", write_evaluation)
    plot = tmp_path / "plots" / "forgetting.png"
    config = Config(
        runs=[run], num_updates=[7, 96], output_dir=str(tmp_path / "study"), plot=str(plot)
    )
    study(config)
    results = json.loads((tmp_path / "study" / "results.json").read_text(encoding="utf-8"))
    # In the evaluation: sft, then the folders by their paths.
    gold = {
        "SFT": 0.0,
        "PPO, 7 updates": 7.0,
        "PPO, 96 updates": 3.0,
        "PPO-ptx, no penalty, 96 updates": 5.0,
    }
    assert {label: results[label]["gold_score"]["mean"] for label in gold} == gold
    assert "| PPO, 7 updates | 0.300 |" in (tmp_path / "study" / "table.md").read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
