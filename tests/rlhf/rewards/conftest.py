"""Saves a random tiny policy and reward models as the stages would."""

from pathlib import Path

import pytest
import torch

from tests.rlhf.rewards.folders import base_tokenizer, save_base, save_reward_model


@pytest.fixture(scope="session")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    return save_base(tmp_path_factory.mktemp("rewards") / "sft", "llama", base_tokenizer())


@pytest.fixture(scope="session")
def saved(sft: Path) -> Path:
    """Save a reward model with a new head, bias 0.5 and scale 2, on the policy's body."""
    return save_reward_model(sft.parent / "rm", sft, seed=1, bias=0.5, scale=2.0)


@pytest.fixture(scope="session")
def other(sft: Path) -> Path:
    """Save a second reward model, of another seed."""
    return save_reward_model(sft.parent / "rm2", sft, seed=2, bias=-0.25, scale=1.0)
