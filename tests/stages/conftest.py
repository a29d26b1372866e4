"""Makes settings of a short, faultless run of the PPO stage on a tiny Llama."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.inputs.chat import Chat
from rlhf.inputs.records import PromptLike
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.rewards.settings import RewardSettings
from rlhf.training.settings import OptimSettings
from stages.ppo.config import Config, MonitorSettings, PPOSettings, PtxSettings, RolloutSettings
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

NUM_UPDATES = 4
SHARPNESS = 0.3
"""Factor on the tiny model's logits: neither sure nor uniform."""


def is_timing(metric: str) -> bool:
    """Return whether two equal runs log different values of this metric."""
    return metric.startswith("seconds/") or metric in (
        "ppo/tokens_per_second",
        "ppo/model_flops_utilisation",
    )


def some_length(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    return [len(response) % 5 / 5 for response in responses]


@pytest.fixture(scope="module")
def ppo_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a policy and prompts."""
    folder = tmp_path_factory.mktemp("ppo")
    write_ppo_inputs(folder)
    return folder


def write_ppo_inputs(folder: Path) -> None:
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    Chat(tokenizer)
    policy = tiny_policy_of("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        policy.lm_head.weight.mul_(SHARPNESS)
    save_policy(policy, tokenizer, folder / "sft")
    prompts = [{"prompt": f"say {number}"} for number in range(12)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))


@pytest.fixture
def ppo_config(ppo_inputs: Path, tmp_path: Path) -> Config:
    """Return settings of a run in which nothing is wrong."""
    return make_ppo_config(ppo_inputs, tmp_path / "ppo")


def make_ppo_config(inputs: Path, output_dir: Path) -> Config:
    return Config(
        output_dir=str(output_dir),
        policy=ModelSettings(path=str(inputs / "sft")),
        prompts=str(inputs / "prompts.jsonl"),
        reward=RewardSettings(function="tests.stages.conftest:some_length"),
        rollout=RolloutSettings(batch_size=32, max_new_tokens=8),
        ppo=PPOSettings(mini_batch_size=16, kl_coef=0.02, value_clip_range=None),
        ptx=PtxSettings(coef=0.0),
        optim=OptimSettings(learning_rate=1e-3, schedule="constant"),
        value_learning_rate=1e-3,
        monitor=MonitorSettings(min_eos_rate=0.0),  # the policy has not learned to end
        num_updates=NUM_UPDATES,
        ema_decay=None,
    )
