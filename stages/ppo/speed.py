"""Measure a run's speed: tokens a second, and the share of the machine's matrix rate it uses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator

from rlhf.measuring.flops import Work, size_of, text_work, update_flops, work_of
from rlhf.rewards.load import reward_models_of
from rlhf.runs.stopwatch import matrix_rate
from rlhf.training.processes import sum_over_processes
from stages.ppo.config import Config
from stages.ppo.learner import PolicyAndValue
from stages.ppo.rollout import Rollout, RolloutWorker

NOT_TRAINING = ("evaluate", "save")
"""Phases of an update whose seconds are left out."""


@dataclass
class Speedometer:
    """Measures the speed of each update, and adds the updates up for the whole run."""

    models: PolicyAndValue
    worker: RolloutWorker
    accelerator: Accelerator
    config: Config
    dtype: torch.dtype
    """dtype of the matrix products in a forward pass"""
    totals: dict[str, float] = field(default_factory=dict)
    """tokens, FLOPs and seconds of all updates so far"""

    def __post_init__(self) -> None:
        self._rate = matrix_rate(self.accelerator.device, self.dtype)
        self._sizes = (
            size_of(self.models.policy),
            size_of(self.models.value_model.classifier),
            [size_of(model.classifier) for model in reward_models_of(self.worker.reward)],
        )

    def measure(
        self, rollout: Rollout, metrics: Mapping[str, float], seconds: Mapping[str, float]
    ) -> dict[str, float]:
        """Return the speeds of an update, all processes together.

        Args:
            metrics: the update's metrics.
            seconds: the update's seconds by phase, and all of them under "update".
        """
        config = self.config
        num_steps = round(metrics["ppo/steps"])
        num_epochs = num_steps / config.steps_per_update * config.ppo.num_epochs
        episodes, texts = work_of(rollout.trees), Work()
        if "ppo/ptx_loss" in metrics:
            num_blocks = math.ceil(config.text_blocks_per_step / self.accelerator.num_processes)
            texts = text_work(config.ptx.block_tokens) * (num_steps * num_blocks)
        is_taught = config.ptx.targets == "reference"
        phases = update_flops(*self._sizes, episodes, texts, num_epochs, is_taught=is_taught)
        if rollout.check is None:
            del phases["logprobs"]
        own = torch.tensor([float(episodes.tokens), sum(phases.values())], dtype=torch.float64)
        tokens, flops = sum_over_processes(self.accelerator, own).tolist()
        trained = seconds["update"] - sum(seconds.get(name, 0.0) for name in NOT_TRAINING)
        update = {"tokens": tokens, "flops": flops, "seconds": trained}
        for name, value in update.items():
            self.totals[name] = self.totals.get(name, 0.0) + value
        return self._speeds(update)

    def mean(self) -> dict[str, float]:
        """Return the speeds over all updates so far."""
        return self._speeds(self.totals)

    def _speeds(self, sums: Mapping[str, float]) -> dict[str, float]:
        rate = self._rate * self.accelerator.num_processes
        return {
            "ppo/tokens_per_second": sums["tokens"] / sums["seconds"],
            "ppo/model_flops_utilisation": sums["flops"] / sums["seconds"] / rate,
        }
