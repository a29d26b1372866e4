"""Runs all stages with adapters, one after the other, and with adapters and full models mixed."""

import json
import re
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from rlhf.inputs.files import write_records
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import PromptTree, text_tree
from rlhf.inputs.records import Demonstration, Prompt, Ranking
from rlhf.models.adapters import read_adapter, weights_sha256
from rlhf.models.loading import load_policy, load_scalar, new_policy
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.models import RewardModel, load_reward_model
from rlhf.rewards.settings import RewardSettings
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training.settings import OptimSettings
from rlhf.training.sharding import local_gradients
from stages.ppo.config import Config as PPOConfig
from stages.ppo.config import MonitorSettings, PPOSettings, PtxSettings, RolloutSettings
from stages.ppo.load import load_models
from stages.ppo.rollout import roll_out
from stages.ppo.train import train as train_ppo
from stages.ppo.update import update
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
    """Write a base and records; responses with an `a` are better."""
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
    """Train an adapter over the base."""
    train_sft(sft_config(work, "sft"))
    return work / "sft"


@pytest.fixture(scope="module")
def rm(work: Path, sft: Path) -> Path:
    """Train the same adapter further, and a head."""
    train_rm(rm_config(work, "sft", "rm"))
    return work / "rm"


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_sft_learns_and_writes_an_adapter_over_the_base(work: Path, sft: Path) -> None:
    results = results_of(sft)
    assert results["held_out_loss"] < 0.8 * results["base_held_out_loss"]
    assert read_adapter(sft).base == str(work / "base")
    assert not (sft / "model.safetensors").exists()


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


# PPO: four roles on one base ---------------------------------------------------------------------


def ppo_config(work: Path, sft: str, rm: str, name: str, **changes: Any) -> PPOConfig:
    prompts = work / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i} b"}) + "\n" for i in range(8)))
    settings: dict[str, Any] = {
        "output_dir": str(work / name),
        "policy": ModelSettings(path=str(work / sft)),
        "lora": LORA,
        "prompts": str(prompts),
        "reward": RewardSettings(model=str(work / rm), allow_chance_reward=True),
        "rollout": RolloutSettings(batch_size=8, max_prompt_tokens=64, max_new_tokens=6),
        "ppo": PPOSettings(mini_batch_size=4),
        "ptx": PtxSettings(coef=0.0),
        "monitor": MonitorSettings(min_eos_rate=0.0),
        "optim": OptimSettings(learning_rate=3e-3, schedule="constant"),
        "value_learning_rate": 3e-3,
        "num_updates": 2,
    }
    return PPOConfig(**{**settings, **changes})


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_ppo_trains_the_policys_adapter_on_from_no_kl(
    work: Path, sft: Path, rm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_ppo(ppo_config(work, "sft", "rm", "ppo"))
    first, second = rows_of(work / "ppo")
    assert abs(first["ppo/kl"]) < 1e-6 and first["ppo/reference_difference_high"] < 1e-6
    assert abs(second["ppo/kl"]) > 1e-4
    assert read_adapter(work / "ppo") == read_adapter(sft)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (sft, work / "ppo"))
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    told = re.search(r"reward models: (\S+) MB, (\S+) MB if each", capsys.readouterr().out)
    assert told is not None and 2 * float(told[1]) < float(told[2])


def test_a_step_of_ppo_touches_two_adapters_and_the_value_head(
    work: Path, sft: Path, rm: Path
) -> None:
    config = ppo_config(work, "sft", "rm", "unused", ptx=PtxSettings(coef=0.5, text="unused"))
    accelerator = Accelerator(cpu=True)
    learner, sampler = load_models(
        config, load_chat(config.policy), accelerator, Stopwatch(accelerator.device)
    )
    models = learner.models
    before = {name: p.clone() for name, p in models.named_parameters()}
    reward_model = sampler.reward
    assert isinstance(reward_model, RewardModel)
    frozen = [*sampler.ref_policy.parameters(), *reward_model.model.parameters()]
    kept = [p.clone() for p in frozen]
    prompts = [FittedPrompt(Prompt("b"), (5 + i, 9, 13)) for i in range(4)]
    rollout = roll_out(
        models.policy,
        models.value_model,
        sampler,
        prompts,
        torch.Generator().manual_seed(0),
        accelerator,
    )
    text = [text_tree([5, 9, 13, 17, 21])]
    with_gradient: set[str] = set()
    handle = register_optimizer_step_pre_hook(
        lambda *_: with_gradient.update(
            n for n, p in models.named_parameters() if p.grad is not None
        )
    )
    update(learner, rollout, repeat(text), config, torch.Generator())
    handle.remove()
    trained = {name: p for name, p in models.named_parameters() if p.requires_grad}
    changed = {n for n, p in models.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(trained) and len(changed) == 28 + 28 + 1
    with_state = {id(p) for p in learner.state.optimizer.state}
    assert with_state == {id(p) for p in trained.values()}
    assert with_gradient == set(trained)
    assert learner.state.average is not None
    assert {f"policy.{name}" for name in learner.state.average.average} == {
        name for name in trained if name.startswith("policy.")
    }
    assert all(torch.equal(p, old) for p, old in zip(frozen, kept, strict=True))


def test_gradients_of_ppo_are_the_same_with_activations_computed_again(
    work: Path, sft: Path, rm: Path
) -> None:
    found = []
    for is_checkpointed in (False, True):
        config = ppo_config(work, "sft", "rm", "unused", gradient_checkpointing=is_checkpointed)
        accelerator = Accelerator(cpu=True)
        learner, _ = load_models(
            config, load_chat(config.policy), accelerator, Stopwatch(accelerator.device)
        )
        learner.models.train(is_checkpointed)
        row = learner.packer.rows([PromptTree((5, 9, 13), ((17, 21, 25),))])[0]
        logprobs, values = learner.state.model(row)
        (logprobs.square().sum() + values.square().sum()).backward()
        found.append(torch.cat(local_gradients(learner.models.parameters())))
    assert found[0].norm() > 1
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_ppo_over_full_models_and_mixed_ones(
    work: Path, sft: Path, rm: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Adapters lie over a full SFT model; one goes with a full reward model; all weights train."""
    train_sft(sft_config(work, "sft_full2", lora=LoraSettings(), num_epochs=1))
    train_rm(rm_config(work, "sft_full2", "rm_over_full2", num_epochs=1))
    train_rm(rm_config(work, "sft", "rm_full2", lora=LoraSettings(), num_epochs=1))
    own = "rm_full2 is no adapter over the policy's base"
    capsys.readouterr()
    for sft_name, rm_name, lora in (
        ("sft_full2", "rm_over_full2", LORA),
        ("sft", "rm_full2", LORA),
        ("sft", "rm", LoraSettings()),
    ):
        name = f"ppo_{rm_name}"
        train_ppo(ppo_config(work, sft_name, rm_name, name, lora=lora, num_updates=1))
        (row,) = rows_of(work / name)
        assert abs(row["ppo/kl"]) < 1e-6
        assert (work / name / "adapter_config.json").exists() == (lora.rank > 0)
        assert (own in capsys.readouterr().out) == (rm_name == "rm_full2")
    assert read_adapter(work / "ppo_rm_over_full2").base == str(work / "sft_full2")
