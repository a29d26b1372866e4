"""Runs SFT, reward model and PPO-ptx with QLoRA: adapters over one base in 4 bits, on a CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf.models.adapters import read_adapter
from rlhf.models.loading import load_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.models.shared_bases import SharedBases, has_four_bits
from rlhf.rewards.models import load_reward_model
from stages.ppo.config import PPOSettings
from stages.ppo.train import train as train_ppo
from stages.rm.train import train as train_rm
from stages.sft.train import train as train_sft
from tests.distributed.chain import make_inputs, ppo_settings, rm_settings, sft_settings
from tests.long.architectures import tokenizer
from tests.rlhf.every_architecture import save_tiny

pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which is not installed")

QLORA = LoraSettings(rank=4, quantize="4bit")
STAGES = ("sft", "rm", "ppo")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the inputs and run each stage. PPO scores the golden rows of the reward model."""
    folder = tmp_path_factory.mktemp("qlora")
    make_inputs(folder)
    sft, rm, ppo = (folder / stage for stage in STAGES)
    train_sft(sft_settings(folder, sft, lora=QLORA))
    train_rm(rm_settings(folder, sft, rm, lora=QLORA, num_epochs=1))
    one_update = {"num_updates": 1, "ppo": PPOSettings(mini_batch_size=4)}
    train_ppo(ppo_settings(folder, sft, rm, ppo, lora=QLORA, **one_update))
    return folder


@pytest.mark.slow
def test_every_stage_trains_the_adapter_of_the_one_before(work: Path) -> None:
    assert {read_adapter(work / stage).base for stage in STAGES} == {str(work / "base")}
    weights = [load_file(work / stage / "adapter_model.safetensors") for stage in STAGES]
    for before, after in ((weights[0], weights[1]), (weights[0], weights[2])):
        assert all((before[name] != after[name]).any() for name in before)


@pytest.mark.slow
def test_ppo_takes_its_first_step_from_the_policy_that_sampled(work: Path) -> None:
    (row, *_) = map(json.loads, (work / "ppo" / "metrics.jsonl").read_text().splitlines())
    assert row["ppo/first_log_ratio"] < 1e-4
    assert row["ppo/sampler_difference"] < 1e-4
    assert row["ppo/ptx_loss"] > 0


def test_bidirectional_model_is_refused_in_four_bits(tmp_path: Path) -> None:
    save_tiny("bert", tokenizer(), tmp_path)
    with pytest.raises(ValueError, match="is bidirectional"):
        load_policy(ModelSettings(path=str(tmp_path)), QLORA)


@pytest.mark.slow
def test_golden_rows_are_held_to_the_tolerance_of_four_bits(work: Path) -> None:
    """They were measured over the full base, and PPO scores them over the one in 4 bits."""
    settings = ModelSettings(path=str(work / "rm"))
    bases = SharedBases(quantize="4bit")
    model = load_reward_model(
        settings, micro_batch_tokens=64, allow_chance_reward=True, bases=bases
    )
    assert has_four_bits(model.model)
    golden = model.card.golden
    found = model.scores(
        [model.chat.prompt_ids(row.prompt) for row in golden],
        [model.chat.response_ids(row.response) for row in golden],
    ).tolist()
    errors = [abs(score - row.score) for score, row in zip(found, golden, strict=True)]
    assert max(errors) > 1e-3
    model.card = replace(model.card, golden=(replace(golden[0], score=9.0),))
    with pytest.raises(ValueError, match="4bit, tolerance"):
        model.check_golden_rows()
