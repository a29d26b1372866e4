"""Tests over-optimisation: points and fits by hand, and the program on random models."""

import json
import math
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.overoptimisation import (
    BEST_OF_N,
    BEST_OF_N_FORM,
    FULL,
    RL_FORM,
    Config,
    Curve,
    best_of_n_curve,
    curve_table,
    fit_all,
    long_ppo,
    ppo_curve,
    small_reward_model,
    study,
)
from rlhf.inputs.files import read_records, write_records
from rlhf.inputs.records import Demonstration, Prompt, Ranking
from rlhf.models.loading import new_policy
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.rewards.settings import RewardSettings
from rlhf.training.settings import OptimSettings
from stages.ppo.config import Config as PPOConfig
from stages.ppo.config import PPOSettings, PtxSettings, RolloutSettings
from stages.rm.config import Config as RMConfig
from stages.rm.train import train as train_rm
from tests.experiments.run_folders import evaluate_config, ppo_config, write_run
from tests.rlhf.tiny_models import byte_tokenizer

WORDS = ["bee", "tree", "sky", "oak", "eel", "ash", "reed", "fog"]

GOLD = """
def make_gold(path):
    weight = float(open(path).read())
    return lambda prompts, responses: [weight * text.count("e") for text in responses]
"""


def curve_of(kl: list[float], gold: list[float]) -> Curve:
    zeros = np.zeros(len(kl))
    return Curve(np.array(kl), np.array(gold), zeros, zeros)


def test_best_of_n_curve_by_hand() -> None:
    rows = [
        {"score": 2.0, "gold": 1.0, "tokens": 4},
        {"score": 1.0, "gold": 5.0, "tokens": 6},
        {"score": 0.0, "gold": -1.0, "tokens": 10},
        {"score": 3.0, "gold": 0.0, "tokens": 20},
    ]
    curve = best_of_n_curve(rows, num_samples=2)
    assert curve.kl.tolist() == pytest.approx([0.0, math.log(2) - 0.5])
    assert curve.proxy.tolist() == pytest.approx([1.5, 2.5])
    assert curve.gold.tolist() == pytest.approx([1.25, 0.5])
    assert curve.tokens.tolist() == pytest.approx([10.0, 12.0])


def test_ppo_curve_is_a_mean_for_each_evaluation() -> None:
    rows = [
        {"step": 0, "kl": 0.5, "gold": 1.0, "score": 0.0, "tokens": 3},
        {"step": 0, "kl": -0.7, "gold": 2.0, "score": 1.0, "tokens": 5},
        {"step": 4, "kl": 4.0, "gold": -1.0, "score": 2.0, "tokens": 9},
    ]
    curve = ppo_curve(rows)
    assert curve.kl.tolist() == pytest.approx([-0.1, 4.0])
    assert curve.gold.tolist() == [1.5, -1.0]
    assert curve.proxy.tolist() == [0.5, 2.0]
    assert curve.tokens.tolist() == [4.0, 9.0]
    assert curve.distance.tolist() == [0.0, 2.0]  # an estimate below 0 counts as 0


@pytest.mark.parametrize(
    ("form", "gold"),
    [
        (RL_FORM, lambda d: d * (1.5 - 0.7 * math.log(d))),
        (BEST_OF_N_FORM, lambda d: 1.5 * d - 0.7 * d**2),
        ("d (a - b d^2)", lambda d: 1.5 * d - 0.7 * d**3),
    ],
)
def test_a_form_finds_its_own_coefficients_and_the_far_half(
    form: str, gold: Callable[[float], float]
) -> None:
    distances = [3.0, 0.5, 1.0, 2.5, 2.0, 1.5]  # in any order
    kl = [d**2 for d in distances]
    fits = fit_all(curve_of([*kl, 0.05], [*map(gold, distances), 99.0]))  # the last is too near 0
    assert fits[form].coefficients == pytest.approx((1.5, 0.7), abs=1e-9)
    assert fits[form].error == pytest.approx(0.0, abs=1e-9)
    assert all(fit.error > 0.05 for name, fit in fits.items() if name != form)


def test_the_constant_is_the_mean_of_the_near_half_the_middle_included() -> None:
    fits = fit_all(curve_of([1.0, 2.0, 3.0, 4.0, 5.0], [0.0, 3.0, 3.0, 5.0, 6.0]))
    assert fits["constant"].coefficients == pytest.approx((2.0,))
    assert fits["constant"].error == pytest.approx(math.sqrt((9 + 16) / 2))


def test_too_few_points_are_not_fitted() -> None:
    with pytest.raises(ValueError, match="3 points have a KL of"):
        fit_all(curve_of([0.0, 1.0, 2.0, 3.0], [0.0] * 4))


def test_the_peak_is_that_of_the_mean_over_seeds() -> None:
    # Means 0, 2, 1.5, 1: the second point, although the first seed is highest on the third.
    first = curve_of([1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 3.0, 1.0])
    second = curve_of([1.0, 4.0, 5.0, 6.0], [0.0, 2.0, 0.0, 1.0])
    row = curve_table({(FULL, "PPO, KL coefficient 0"): [first, second]}).splitlines()[-1]
    assert row.startswith("| full | PPO, KL coefficient 0 | 2.0, 4.0 | 2.00, 2.00 | 4.0, 6.0 |")
    assert "| 1.00, 1.00 | -1.00, -1.00 |" in row


def test_long_ppo_changes_what_the_study_is_about_only(tmp_path: Path) -> None:
    run = str(tmp_path)
    write_run(ppo_config(run))
    config = Config(runs=[run], num_updates=60, eval_every=4, num_prompts=128)
    found = long_ppo(config, run, "100", "some/rm", 0.0)
    assert found.output_dir == f"{run}/overoptimisation/100_kl_0"
    assert (found.reward.model, found.ppo.kl_coef, found.ptx.coef) == ("some/rm", 0.0, 0.0)
    assert (found.num_updates, found.eval_every, found.ema_decay) == (60, 4, None)
    assert (found.num_eval_prompts, found.num_samples) == (128, 128)
    assert (found.policy, found.optim, found.seed) == (
        ppo_config(run).policy,
        ppo_config(run).optim,
        3,
    )


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Write a run folder with a random policy, and a reward model that was trained to count e's."""
    folder = tmp_path_factory.mktemp("pipeline")
    run = str(folder)
    tokenizer = byte_tokenizer("<end>", "<pad>", eos_token="<end>", pad_token="<pad>")
    torch.manual_seed(0)
    architecture = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    save_policy(new_policy(architecture, tokenizer), tokenizer, folder / "sft")
    (folder / "judge_of_overoptimisation_test.py").write_text(GOLD)
    (folder / "weight").write_text("2.0")
    ranks = tuple(4 - word.count("e") for word in WORDS)
    write_records(
        folder / "rankings.jsonl",
        [Ranking(prompt=f"Q{i}", responses=tuple(WORDS), ranks=ranks) for i in range(24)],
    )
    write_records(folder / "prompts.jsonl", [Prompt(prompt=f"P{i}") for i in range(16)])
    write_records(folder / "held_out.jsonl", [Prompt(prompt=f"H{i}") for i in range(13)])
    write_records(folder / "demos.jsonl", [Demonstration(prompt="P", response=w) for w in WORDS])
    gold: dict[str, Any] = {
        "gold": "judge_of_overoptimisation_test:make_gold",
        "gold_path": f"{run}/weight",
    }
    write_run(evaluate_config(run, **gold))
    ppo = PPOConfig(
        output_dir=f"{run}/ppo",
        policy=ModelSettings(path=f"{run}/sft"),
        prompts=f"{run}/prompts.jsonl",
        prompts_held_out=f"{run}/held_out.jsonl",
        reward=RewardSettings(model=f"{run}/rm", missing_end_value=0.5),
        rollout=RolloutSettings(batch_size=8, max_prompt_tokens=60, max_new_tokens=6),
        ppo=PPOSettings(mini_batch_size=4),
        ptx=PtxSettings(coef=0.0),
        optim=OptimSettings(learning_rate=0.03, schedule="constant"),
        value_learning_rate=0.01,
    )
    write_run(ppo)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(run)
        train_rm(
            RMConfig(
                output_dir=f"{run}/rm",
                model=ModelSettings(path=f"{run}/sft"),
                rankings=[f"{run}/rankings.jsonl"],
                held_out=0.4,
                demonstrations=f"{run}/demos.jsonl",
                batch_size=4,
                optim=OptimSettings(learning_rate=0.01),
                **gold,
            )
        )
        yield run


def config_of(run: str) -> Config:
    return Config(
        runs=[run],
        small_prompts=6,
        small_epochs=3,
        num_updates=24,
        eval_every=3,
        num_prompts=12,
        num_samples=16,
        output_dir=f"{run}/study",
        plot=f"{run}/plots/plot.png",
    )


def test_both_reward_models_are_measured_on_prompts_that_neither_saw(pipeline: str) -> None:
    small = small_reward_model(config_of(pipeline), pipeline)
    drawn = {record.key for record in read_records(small.rankings[0], Ranking)}
    assert small.held_out_rankings is not None
    held_out = {record.key for record in read_records(small.held_out_rankings[0], Ranking)}
    results = json.loads(Path(pipeline, "rm", "results.json").read_text())
    assert len(drawn) == 6
    assert len(held_out) == results["held_out_counts"]["rankings"] == 24 - results["train_prompts"]
    assert not drawn & held_out
    again = small_reward_model(config_of(pipeline), pipeline)
    assert {record.key for record in read_records(again.rankings[0], Ranking)} == drawn


@pytest.mark.slow
@pytest.mark.long
def test_the_program_from_rankings_to_fits(pipeline: str) -> None:
    study(config_of(pipeline))
    folder = Path(pipeline) / "overoptimisation"
    rows = [json.loads(line) for line in (folder / BEST_OF_N / "samples.jsonl").open()]
    by_prompt = [(prompt, len(list(of))) for prompt, of in groupby(rows, key=lambda r: r["prompt"])]
    assert by_prompt == [(f"H{i}", 16) for i in range(12)]
    results = json.loads(Path(pipeline, "study", "results.json").read_text())
    assert set(results) == {
        *(f"{proxy}/{optimiser}" for proxy in ("full", "6") for optimiser in optimisers()),
        "seconds",
    }
    (best_of_n,) = results["full/best-of-n"]["curves"]
    assert len(best_of_n["kl"]) == 5  # n = 1, 2, 4, 8, 16
    assert best_of_n["proxy"] == sorted(best_of_n["proxy"])
    assert best_of_n["gold"][0] == pytest.approx(0.0, abs=1e-9)  # relative to SFT itself
    marks = np.array([2.0 * row["response"].count("e") for row in rows])
    (curve,) = results["6/PPO, KL coefficient 0"]["curves"]
    kept = [json.loads(line) for line in (folder / "6_kl_0" / "samples.jsonl").open()]
    last = [2.0 * row["response"].count("e") for row in kept if row["step"] == 23]
    assert len(last) == 12
    assert curve["gold"][-1] == pytest.approx((np.mean(last) - marks.mean()) / marks.std())
    assert Path(pipeline, "plots", "plot.png").read_bytes().startswith(b"\x89PNG")


def optimisers() -> list[str]:
    return [BEST_OF_N, "PPO, KL coefficient 0", "PPO, KL coefficient 0.05"]
