"""A run that must stop on all processes because one of them meets NaN."""

import math
from pathlib import Path
from typing import Any

import pytest
from accelerate.utils import gather_object

import rlhf.generation.hf
import stages.ppo.learner
from rlhf.rewards.settings import RewardSettings
from rlhf.training.processes import start_accelerator
from stages.ppo import train as ppo_train
from stages.ppo.config import PPOSettings
from stages.ppo.monitor import TrainingStopped
from tests.distributed.chain import ppo_settings


def stopped_by_nan_in_sampling(inputs: Path, results: Path) -> list[str]:
    """PPO over the folders of `run_chain`, in which the last process's sampler meets NaN."""
    accelerator = start_accelerator()
    sample = rlhf.generation.hf._sample
    config = ppo_settings(
        inputs,
        results / "sft",
        results / "rm",
        results / "stopped_sampling",
        reward=RewardSettings(model=str(results / "rm"), allow_chance_reward=True),
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingStopped) as stopped:
        if accelerator.is_last_process:
            broken = lambda logits, *rest: sample(logits * math.nan, *rest)  # noqa: E731
            patch.setattr(rlhf.generation.hf, "_sample", broken)
        ppo_train.train(config)
    accelerator.wait_for_everyone()
    return gather_object([str(stopped.value)])


def stopped_by_nan(inputs: Path, results: Path) -> list[str]:
    """PPO over the folders of `run_chain`, whose second update gives the last process NaN in every
    pass with a gradient; what each process says."""
    accelerator = start_accelerator()
    update, forward = ppo_train.update, stages.ppo.learner.response_logprobs
    num_updates = 0

    def spoil(*args: Any, **settings: Any) -> Any:
        nonlocal num_updates
        num_updates += 1
        if num_updates == 2 and accelerator.is_last_process:
            broken = lambda *some: forward(*some) * math.nan  # noqa: E731
            patch.setattr(stages.ppo.learner, "response_logprobs", broken)
        return update(*args, **settings)

    config = ppo_settings(
        inputs,
        results / "sft",
        results / "rm",
        results / "stopped",
        ppo=PPOSettings(mini_batch_size=4),
    )
    with pytest.MonkeyPatch.context() as patch, pytest.raises(TrainingStopped) as stopped:
        patch.setattr(ppo_train, "update", spoil)
        ppo_train.train(config)
    accelerator.wait_for_everyone()
    return gather_object([str(stopped.value)])
