"""Make the models of the check, and PPO's loop over them."""

import gc
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from accelerate.state import AcceleratorState
from transformers import AutoConfig, PreTrainedModel

from benchmarks import folders, machine
from benchmarks.gpu_check.records import Emit
from benchmarks.gpu_check.setting import Setting
from benchmarks.ours import PPOLoop, ppo_config
from benchmarks.workload import Workload, ppo_prompts, spread_lengths
from rlhf.models.loading import load_policy
from rlhf.models.settings import ModelSettings
from stages.ppo.config import Config

Precision = Literal["autocast", "bf16 weights"]
"""autocast: float32 weights and bfloat16 products, as configs/accelerate/gpu.yaml asks for.
bf16 weights: bfloat16 throughout, as DeepSpeed and FSDP2 hold what they compute with."""
PRECISIONS: tuple[Precision, ...] = ("autocast", "bf16 weights")

SHARPNESS = 6.0
"""Factor of the random policy's logits. It brings the entropy of its tokens down to a few nats, as
that of trained models is; rounding hardly shows in a nearly uniform distribution."""
MINI_BATCHES = 4
"""Mini-batches of a rollout, so that training packs its rows in another way than the rollout."""


def models(setting: Setting, emit: Emit) -> None:
    """Make the policy and the reward model, and report their sizes."""
    policy = load(setting, "bf16 weights")
    count = sum(weight.numel() for weight in policy.parameters())
    made = "given" if setting.model else "random weights"
    emit({"model": str(policy_path(setting)), "weights": made, "parameters": count})
    emit({"model": str(reward_path(setting)), "weights": "random head on the policy's body"})


def policy_path(setting: Setting) -> Path:
    if setting.model is not None:
        return Path(setting.model)
    setting.folder.mkdir(parents=True, exist_ok=True)
    return folders.policy_folder(setting.folder, setting.sizes.shape, SHARPNESS)


def reward_path(setting: Setting) -> Path:
    return folders.reward_folder(policy_path(setting), setting.folder)


def load(setting: Setting, precision: Precision) -> PreTrainedModel:
    """Load the policy on the device, with the weights of this precision."""
    settings = model_settings(setting, precision)
    return load_policy(settings).to(machine.default_device())  # type: ignore[arg-type]


def model_settings(setting: Setting, precision: Precision) -> ModelSettings:
    dtype: Literal["float32", "bfloat16"] = "float32" if precision == "autocast" else "bfloat16"
    return ModelSettings(path=str(policy_path(setting)), dtype=dtype)


def autocast(precision: Precision) -> AbstractContextManager[object]:
    """Return the context of passes of this precision."""
    device = machine.default_device().type
    return torch.autocast(device, torch.bfloat16, enabled=precision == "autocast")


def prompts(setting: Setting, lengths: Sequence[int]) -> list[list[int]]:
    """Draw prompts of these lengths."""
    vocab_size = AutoConfig.from_pretrained(policy_path(setting)).vocab_size
    return ppo_prompts(lengths=lengths, vocab_size=vocab_size)


def ppo_loop(setting: Setting, precision: Precision) -> PPOLoop:
    """Load PPO's models and return its loop over prompts of different lengths."""
    sizes = setting.sizes
    work = Workload(
        name="gpu_check",
        kind="ppo",
        policy=str(policy_path(setting)),
        reward_model=str(reward_path(setting)),
        prompts=prompts(setting, spread_lengths(sizes.episodes, *sizes.prompt_tokens)),
        new_tokens=sizes.new_tokens,
        micro_batch_tokens=sizes.micro_batch_tokens,
        dtype="bfloat16",
    )
    release_memory()
    # accelerate keeps the first mixed precision of a process, whatever is set later.
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if precision == "autocast" else "no"
    return PPOLoop(work, ppo_settings(work, setting, precision))


def ppo_settings(work: Workload, setting: Setting, precision: Precision) -> Config:
    config = ppo_config(work, str(setting.folder / "unused"))
    return replace(
        config,
        policy=model_settings(setting, precision),
        ppo=replace(config.ppo, mini_batch_size=setting.sizes.episodes // MINI_BATCHES),
    )


def release_memory() -> None:
    """Free what earlier parts held; a model and its hooks are a cycle, which only gc frees."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
