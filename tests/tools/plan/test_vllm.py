"""What vLLM takes of a GPU, from numbers worked by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.generation.settings import GenerationSettings
from rlhf.models.settings import LoraSettings
from stages.ppo.config import Config
from tests.tools.plan.inputs import (
    EMBEDDING,
    LAYER,
    OUTSIDE,
    fine_tuning_config,
    save_reward,
    weights_of,
)
from tools.plan.__main__ import main
from tools.plan.launch import Launch
from tools.plan.make import make_plan

ROOT = Path(__file__).parents[3]
VLLM = GenerationSettings(engine="vllm", batch_size=8, vllm_memory_share=0.3)
GPU = 10_000_000
"""Bytes, of which vLLM takes 3 million."""
NUMBERS = OUTSIDE + 2 * LAYER
"""Of the policy."""


@pytest.fixture
def sampled_by_vllm(config: Config) -> Config:
    return replace(config, generation=VLLM)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("splitting", "gathered"),
    [
        ({}, 0),
        ({"zero_stage": 2}, 0),
        ({"zero_stage": 3}, EMBEDDING),  # all others are small, and whole anyway
        ({"is_fsdp": True}, EMBEDDING + 32 * 32),  # the embedding is held when q is gathered
    ],
    ids=str,
)
def test_vllm_takes_its_share_while_it_samples_and_the_policy_stays_split(
    splitting: dict[str, Any], gathered: int, config: Config, sampled_by_vllm: Config
) -> None:
    launch = Launch(2, mixed_precision="bf16", device="cuda", gpu_bytes=GPU, **splitting)
    plan = make_plan(sampled_by_vllm, launch)
    copy = 2 * NUMBERS  # in bfloat16
    assert plan.parts["vLLM's copy of the policy"] == copy
    assert plan.parts["vLLM's cache and passes"] == 3_000_000 - copy
    assert plan.parts["weights on their way to vLLM"] == 2 * gathered
    assert plan.phases.pop("rollout") == sum(plan.held.values()) + 3_000_000 + 2 * gathered
    # It sleeps in all other phases, in which nothing changes.
    by_our_loop = make_plan(config, launch)
    del by_our_loop.phases["rollout"]
    assert plan.phases == by_our_loop.phases
    assert plan.held == by_our_loop.held


def test_without_mixed_precision_the_copy_has_the_type_of_the_policy(
    sampled_by_vllm: Config,
) -> None:
    plan = make_plan(sampled_by_vllm, Launch(device="cuda", gpu_bytes=GPU))
    assert plan.parts["vLLM's copy of the policy"] == 4 * NUMBERS


def test_adapters_are_added_to_one_weight_at_a_time(sampled_by_vllm: Config) -> None:
    config = replace(sampled_by_vllm, lora=LoraSettings(rank=4))
    plan = make_plan(config, Launch(device="cuda", gpu_bytes=GPU))
    assert plan.parts["vLLM's copy of the policy"] == 4 * NUMBERS
    # The sum before, the product of B and A, and the same scaled; all of the size of up.
    assert plan.parts["weights on their way to vLLM"] == 4 * 3 * 32 * 48
    split = make_plan(config, Launch(2, is_fsdp=True, device="cuda", gpu_bytes=GPU))
    # No adapter is on the embedding. q has A and B of rank 4.
    gathered = EMBEDDING + 32 * 32 + 4 * (32 + 32)
    assert split.parts["weights on their way to vLLM"] == 4 * (gathered + 3 * 32 * 48)


@pytest.mark.parametrize(
    ("launch", "share", "message"),
    [
        (Launch(gpu_bytes=GPU), 0.3, "the launcher starts no process on a CUDA GPU; choose hf"),
        (Launch(device="cuda"), 0.3, "no GPU here to ask for its size; give --gpu_gib 80"),
        (
            Launch(device="cuda", gpu_bytes=GPU),
            0.1,
            r"is 0.1, 0.0 GB of the GPU, .* takes 0.0 GB; give more than 0.11",
        ),
    ],
    ids=["no GPU", "unknown", "too small"],
)
def test_a_vllm_that_would_not_start_is_refused(
    launch: Launch, share: float, message: str, sampled_by_vllm: Config
) -> None:
    generation = replace(VLLM, vllm_memory_share=share)
    with pytest.raises(ValueError, match=message):
        make_plan(replace(sampled_by_vllm, generation=generation), launch)


def test_fine_tuning_samples_after_training_or_beside_the_trained_policy(
    tiny: Path, tmp_path: Path
) -> None:
    """It samples along the training only if a reward model chooses the checkpoint."""
    launch = Launch(device="cuda", mixed_precision="bf16", gpu_bytes=GPU)
    by_our_loop = fine_tuning_config(tiny, tmp_path / "run", response_tokens=8)
    config = replace(by_our_loop, generation=VLLM)
    plan, other = make_plan(config, launch), make_plan(by_our_loop, launch)
    assert plan.phases["samples"] == weights_of(tiny) + 3_000_000  # the chosen policy alone
    assert plan.parts["vLLM's copy of the policy"] == 4 * NUMBERS  # no autocast any more
    assert plan.phases["train"] == other.phases["train"]
    reward = save_reward(tiny / "sft", tmp_path / "reward", LoraSettings())
    judged: dict[str, Any] = {"reward_model": reward, "choose_by": "reward_score"}
    plan = make_plan(replace(config, **judged), launch)
    other = make_plan(replace(by_our_loop, **judged), launch)
    assert plan.parts["vLLM's copy of the policy"] == 2 * NUMBERS
    assert plan.phases["train"] == other.phases["train"]  # vLLM sleeps
    held = sum(plan.held.values())
    assert plan.phases["samples"] == held + 3_000_000 + plan.parts["weights on their way to vLLM"]
    with pytest.raises(ValueError, match="all 2 processes must start together"):
        make_plan(config, replace(launch, num_processes=2))


@pytest.mark.slow
def test_the_program_takes_the_memory_of_the_gpu(
    tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--config", str(ROOT / "configs/ppo/tiny.yaml"), "--rollout.batch_size=32"]
    gpu = ["--accelerate", str(ROOT / "configs/accelerate/gpu.yaml"), "--gpu_gib", "24"]
    policy = ["--policy.path", str(tiny / "sft"), "--generation.engine=vllm"]
    main([*settings, *gpu, *policy])
    cache = 0.3 * 24 * 2**30 - 2 * NUMBERS
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if "vLLM's cache and passes" in line
    )
    assert line.split()[-2:] == [f"{cache / 1e6:,.1f}", "MB"]
