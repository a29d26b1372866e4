"""All stages with adapters, one after the other through their folders, and mixed with full ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rlhf.config import LoraSettings, ModelSettings, OptimSettings
from rlhf.datasets import write_records
from rlhf.lora import read_adapter, weights_sha256
from rlhf.models import load_policy, load_scalar, new_policy, save_policy
from rlhf.records import Demonstration, Ranking
from rlhf.rewards import load_reward_model
from stages.rm.config import Config as RmConfig
from stages.rm.train import train as train_rm
from stages.sft.config import Config as SftConfig
from stages.sft.train import train as train_sft
from tests.rlhf.tiny_models import byte_tokenizer

LORA = LoraSettings(rank=4)
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and records: responses with an `a` are the better ones."""
    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    tokenizer = byte_tokenizer("<end>", "<pad>", eos_token="<end>", pad_token="<pad>")
    save_policy(new_policy(LLAMA, tokenizer), tokenizer, folder / "base")
    letters = "bcdefghijklmnopq"
    write_records(
        folder / "demonstrations.jsonl",
        [Demonstration(letter, f"a{letter}a") for letter in letters],
    )
    rankings = [
        Ranking(f"{one} {other}", (f"{one}a", f"a{other}", one + other, other), (1, 1, 2, 2))
        for one in letters
        for other in letters[:4]
    ]
    write_records(folder / "rankings.jsonl", rankings)
    return folder


def sft_config(work: Path, name: str, **changes: Any) -> SftConfig:
    settings: dict[str, Any] = {
        "model": ModelSettings(path=str(work / "base")),
        "lora": LORA,
        "demonstrations": str(work / "demonstrations.jsonl"),
        "held_out": 0.2,
        "batch_size": 4,
        "micro_batch_size": 2,
        "num_epochs": 3,
        "optim": OptimSettings(learning_rate=1e-2),
        "max_prompt_tokens": 64,
        "max_response_tokens": 8,
        "num_samples": 2,
        "output_dir": str(work / name),
    }
    return SftConfig(**{**settings, **changes})


def rm_config(work: Path, sft: str, name: str, **changes: Any) -> RmConfig:
    settings: dict[str, Any] = {
        "output_dir": str(work / name),
        "model": ModelSettings(path=str(work / sft)),
        "lora": LORA,
        "rankings": [str(work / "rankings.jsonl")],
        "held_out": 0.25,
        "demonstrations": str(work / "demonstrations.jsonl"),
        "batch_size": 8,
        "num_epochs": 3,
        "optim": OptimSettings(learning_rate=1e-2),
    }
    return RmConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def sft(work: Path) -> Path:
    """An adapter over the base."""
    train_sft(sft_config(work, "sft"))
    return work / "sft"


@pytest.fixture(scope="module")
def rm(work: Path, sft: Path) -> Path:
    """The same adapter, trained on, and a head."""
    train_rm(rm_config(work, "sft", "rm"))
    return work / "rm"


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_sft_learns_and_writes_an_adapter_over_the_base(work: Path, sft: Path) -> None:
    results = results_of(sft)
    assert results["held_out_loss"] < 0.8 * results["base_held_out_loss"]
    assert read_adapter(sft).base == str(work / "base")
    assert not (sft / "model.safetensors").exists()
    checkpoint = sft / "checkpoints" / f"checkpoint-{results['chosen_step']}"
    assert read_adapter(checkpoint) == read_adapter(sft)
    names = ("adapter_model.safetensors",)
    one, other = (load_file(folder / names[0]) for folder in (sft, checkpoint))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_gives_the_same_adapter_twice(work: Path, sft: Path) -> None:
    train_sft(sft_config(work, "again"))
    one, other = (load_file(work / n / "adapter_model.safetensors") for n in ("sft", "again"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_rm_trains_the_sft_adapter_on_over_the_same_base(work: Path, sft: Path, rm: Path) -> None:
    assert results_of(rm)["pair_accuracy"] > 0.8
    assert replace(read_adapter(rm), has_head=False) == read_adapter(sft)
    weights = {folder: load_file(folder / "adapter_model.safetensors") for folder in (sft, rm)}
    assert set(weights[rm]) - set(weights[sft]) == {"base_model.model.score.weight"}
    assert all(not torch.equal(weights[rm][name], value) for name, value in weights[sft].items())
    load_reward_model(ModelSettings(path=str(rm)), micro_batch_tokens=256)


def test_lineage_names_the_base_and_the_adapter(work: Path, sft: Path, rm: Path) -> None:
    model = json.loads((rm / "lineage.json").read_text())["inputs"]["model"]
    sha256 = weights_sha256(str(work / "base"))
    assert model["base"] == {"path": str(work / "base"), "sha256": sha256}
    assert len(model["sha256"]["adapter_model.safetensors"]) == 64
    base = json.loads((sft / "lineage.json").read_text())["inputs"]["model"]
    assert base["sha256"]["model.safetensors"] == sha256


def test_full_stages_go_on_from_adapters_and_adapters_from_full_models(
    work: Path, sft: Path
) -> None:
    train_rm(rm_config(work, "sft", "rm_full", lora=LoraSettings(), num_epochs=1))
    assert (work / "rm_full" / "model.safetensors").exists()
    merged, trained = (
        one.base_model.state_dict()
        for one in (
            load_policy(ModelSettings(path=str(sft))),
            load_scalar(ModelSettings(path=str(work / "rm_full"))).classifier,
        )
    )
    steps = 0.01 * results_of(work / "rm_full")["steps"]
    for name, weight in merged.items():
        assert (trained[name] - weight).abs().max() <= 1.5 * steps  # a step of Adam is 0.01
    train_sft(sft_config(work, "sft_full", lora=LoraSettings(), num_epochs=1))
    train_rm(rm_config(work, "sft_full", "rm_over_full", num_epochs=1))
    assert read_adapter(work / "rm_over_full").base == str(work / "sft_full")


def test_another_rank_than_the_adapters_is_refused(work: Path, sft: Path) -> None:
    with pytest.raises(ValueError, match=r"lora\.rank is 8, but .*sft holds an adapter with 4"):
        train_rm(rm_config(work, "sft", "rm_refused", lora=LoraSettings(rank=8)))
