"""Packed passes without gradient: log-probabilities, values and scores of prompt trees."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf.logprobs import token_logprobs
from rlhf.models import ScalarModel, response_logits
from rlhf.packing import Packer, PromptTree, assemble


@torch.no_grad()
def compute_logprobs(
    policy: nn.Module, trees: Sequence[PromptTree], packer: Packer, *, temperature: float = 1.0
) -> Tensor:
    """Log-probability in nats of every response token, (responses, time), 0 behind the end."""
    rows = packer.rows(trees)
    parts = []
    for row in rows:
        row_on_device = row.to(_device(policy))
        logits = response_logits(policy, row_on_device)
        logprobs = token_logprobs(logits, row_on_device.targets, temperature)
        parts.append(row_on_device.unpack(logprobs).cpu())
    return assemble(rows, parts)


@torch.no_grad()
def compute_values(value_model: ScalarModel, trees: Sequence[PromptTree], packer: Packer) -> Tensor:
    """Value of the state before every response token, (responses, time), 0 behind the end."""
    rows = packer.rows(trees)
    parts = []
    for row in rows:
        row_on_device = row.to(_device(value_model))
        values = value_model(row_on_device.predictors, **row_on_device.model_inputs)
        parts.append(row_on_device.unpack(values).cpu())
    return assemble(rows, parts)


@torch.no_grad()
def compute_scores(
    reward_model: ScalarModel, trees: Sequence[PromptTree], packer: Packer
) -> Tensor:
    """Score of every response, (responses,), read at its last token."""
    rows = packer.rows(trees)
    parts = []
    for row in rows:
        row_on_device = row.to(_device(reward_model))
        parts.append(reward_model(row_on_device.last_tokens, **row_on_device.model_inputs).cpu())
    return assemble(rows, parts)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
