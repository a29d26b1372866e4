"""Hold the two models that learn, and run them on the rows of a step."""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.inputs.packing import PackedRow, Packer
from rlhf.models.heads import response_divergence, response_logprobs
from rlhf.models.scalar import ScalarModel
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training import sharding
from rlhf.training.step import TrainState

POLICY, VALUE = 0, 1
"""Indices of the two models in TrainState.modules."""


class PolicyAndValue(nn.Module):
    """Joins both trained models, since DeepSpeed and FSDP wrap only one module per Accelerator."""

    def __init__(self, policy: PreTrainedModel, value_model: ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model

    def forward(
        self,
        row: PackedRow,
        temperature: float = 1.0,
        *,
        with_logprobs: bool = True,
        with_values: bool = True,
        teacher: nn.Module | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return log-probabilities and values of each response token of a packed row, both
        (tokens,).

        With a teacher, KL(teacher || policy) stands in place of the log-probabilities."""
        logprobs = None
        if teacher is not None:
            logprobs = response_divergence(self.policy, teacher, row)
        elif with_logprobs:
            logprobs = response_logprobs(self.policy, row, temperature)
        values = self.value_model(row.predictors, **row.model_inputs) if with_values else None
        return logprobs, values


@dataclass
class Learner:
    """Holds the models in training, their optimizer, and the packer that makes their rows."""

    state: TrainState[PolicyAndValue]
    packer: Packer
    stopwatch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def models(self) -> PolicyAndValue:
        return self.state.module

    def gather(self, part: nn.Module) -> AbstractContextManager[None]:
        """Gather the whole weights of one model, or a part of it, for passes without a gradient.

        Every process holds them until the end of the context. Only this part may run inside."""
        return sharding.whole_weights(self.state.accelerator, self.state.model, part)

    def text_nats(self, row: PackedRow, teacher: nn.Module | None) -> Tensor:
        """Return the loss (tokens,) of each token of pretraining text, in nats.

        It is -log pi(token), or with a teacher KL(teacher || policy) at the token."""
        if teacher is None:
            logprobs, _ = self.state.model(row, with_values=False)
            return -logprobs
        divergence, _ = self.state.model(row, with_values=False, teacher=teacher)
        return divergence


@dataclass
class RowOutputs:
    """Runs policy and value model on a packed row, each when its output is asked for.

    So a step can run the backward pass of one before the forward pass of the other, and holds half
    the activations. Processes that exchange gradients need both models in one backward pass, so
    they run both at once.
    """

    learner: Learner
    row: PackedRow
    temperature: float
    only_value: bool = False
    """whether only the value model learns; the policy then runs without a gradient"""

    @property
    def logprobs(self) -> Tensor:
        """(responses, time) log-probability of each token, at the sampling temperature."""
        if self._is_joint:
            logprobs, _ = self._both
        else:
            with torch.set_grad_enabled(not self.only_value):
                logprobs, _ = self._model(self.row, self.temperature, with_values=False)
        return self.row.unpack(logprobs)

    @property
    def values(self) -> Tensor:
        """(responses, time) value of the state before each token."""
        if self._is_joint:
            _, values = self._both
        else:
            _, values = self._model(self.row, self.temperature, with_logprobs=False)
        return self.row.unpack(values)

    @cached_property
    def _both(self) -> tuple[Tensor, Tensor]:
        return self._model(self.row, self.temperature)

    @property
    def _is_joint(self) -> bool:
        return self.learner.state.is_exchanged

    @property
    def _model(self) -> nn.Module:
        return self.learner.state.model
