"""Runs SFT, reward model and PPO-ptx with QLoRA: adapters over one base in 4 bits, on a CPU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf.models.adapters import read_adapter
from rlhf.models.loading import load_policy
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.models.shared_bases import SharedBases, has_four_bits
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.models import load_reward_model
from stages.ppo.config import PPOSettings
from stages.ppo.train import train as train_ppo
from stages.rm.train import train as train_rm
from stages.sft.train import train as train_sft
from tests.distributed.chain import make_inputs, ppo_settings, rm_settings, sft_settings
from tests.long.architectures import tokenizer
from tests.rlhf.every_architecture import save_tiny
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

pytest.importorskip("bitsandbytes", reason="QLoRA needs bitsandbytes, which is not installed")
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

QLORA = LoraSettings(rank=4, quantize="4bit")
STAGES = ("sft", "rm", "ppo")
WIDE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64}
"""Widths that are whole blocks of 64 weights, as QLoRA needs them on a CPU."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the inputs and run each stage. PPO scores the golden rows of the reward model."""
    folder = tmp_path_factory.mktemp("qlora")
    make_inputs(folder, **WIDE)
    soften(folder / "base")
    sft, rm, ppo = (folder / stage for stage in STAGES)
    train_sft(sft_settings(folder, sft, lora=QLORA))
    train_rm(rm_settings(folder, sft, rm, lora=QLORA, num_epochs=1))
    one_update = {"num_updates": 1, "ppo": PPOSettings(mini_batch_size=4)}
    train_ppo(ppo_settings(folder, sft, rm, ppo, lora=QLORA, **one_update))
    return folder


def soften(folder: Path) -> None:
    """Scale matrices down: with the large random weights of our tests 4 bits change every score."""
    settings = ModelSettings(path=str(folder))
    model = load_policy(settings)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.mul_(0.3)
    save_policy(model, load_tokenizer(settings.path), folder)


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


def test_gradients_do_not_depend_on_the_processors_instructions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are bf16 instructions, bitsandbytes cuts adapters off after a pass in eval mode.

    Loading a policy makes such a pass.
    """
    words = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    save_policy(tiny_policy_of("llama", vocab_size=len(words), **WIDE), words, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8, 9]])

    def gradients(has_bf16: bool) -> dict[str, Tensor]:
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: has_bf16)
        torch.manual_seed(0)
        policy = load_policy(ModelSettings(path=str(tmp_path)), QLORA).train()
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        policy(ids, labels=ids).loss.backward()
        found = {name: p.grad for name, p in policy.named_parameters() if p.requires_grad}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    plain, bf16 = gradients(False), gradients(True)
    assert plain.keys() == bf16.keys() and len(plain) == 28
    assert all(torch.equal(plain[name], bf16[name]) for name in plain)


@pytest.mark.parametrize("width", [64, 192, 576])
def test_widths_of_whole_blocks_are_read_right_on_this_machine(width: int) -> None:
    """Each weight becomes the nearest of 16 values (Dettmers et al. 2023) times its block's scale.

    The largest gap between neighbours is from -1 to -0.696, so no error is above 0.153 scales.
    """
    weight = torch.randn(48, width, generator=torch.Generator().manual_seed(0))
    found = dequantize_4bit(*quantize_4bit(weight, quant_type="nf4"))
    scales = weight.reshape(-1, 64).abs().amax(dim=1, keepdim=True)
    errors = (found - weight).reshape(-1, 64).abs() / scales
    assert 0.1 < errors.max().item() < 0.153


def test_width_that_is_no_whole_number_of_blocks_is_refused(tmp_path: Path) -> None:
    """On a processor with AVX-512, bitsandbytes would read such weights wrong."""
    save_tiny("llama", tokenizer(), tmp_path, hidden_size=96)
    with pytest.raises(ValueError, match=r"q_proj .* reads 96 inputs: .* multiple of 64"):
        load_policy(ModelSettings(path=str(tmp_path)), QLORA)


def test_bidirectional_model_is_refused_in_four_bits(tmp_path: Path) -> None:
    save_tiny("bert", tokenizer(), tmp_path, **WIDE)
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
