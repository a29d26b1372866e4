"""Runs packed passes without gradient: log-probabilities, values and scores of prompt trees."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlhf.inputs.packing import PackedRow, Packer, PromptTree, assemble
from rlhf.maths.logprobs import TokenMoments
from rlhf.models.heads import response_logprobs, response_moments
from rlhf.models.scalar import ScalarModel


def compute_logprobs(
    policy: nn.Module, trees: Sequence[PromptTree], packer: Packer, *, temperature: float = 1.0
) -> Tensor:
    """Return the log-probability in nats of every response token (responses, time), padded by 0."""

    def logprobs(row: PackedRow) -> list[Tensor]:
        return [row.unpack(response_logprobs(policy, row, temperature))]

    return _over_rows(policy, trees, packer, logprobs)[0]


def compute_moments(
    policy: nn.Module, trees: Sequence[PromptTree], packer: Packer, *, temperature: float = 1.0
) -> TokenMoments:
    """Return `compute_logprobs` and each token's entropy and variance, all (responses, time)."""

    def moments(row: PackedRow) -> list[Tensor]:
        return [row.unpack(part) for part in response_moments(policy, row, temperature)]

    return TokenMoments(*_over_rows(policy, trees, packer, moments))


def compute_values(value_model: ScalarModel, trees: Sequence[PromptTree], packer: Packer) -> Tensor:
    """Return the value of the state before every response token (responses, time), padded by 0."""

    def values(row: PackedRow) -> list[Tensor]:
        return [row.unpack(value_model(row.predictors, **row.model_inputs))]

    return _over_rows(value_model, trees, packer, values)[0]


def compute_scores(
    reward_model: ScalarModel, trees: Sequence[PromptTree], packer: Packer
) -> Tensor:
    """Return the score of every response (responses,), read at its last token."""

    def scores(row: PackedRow) -> list[Tensor]:
        return [reward_model(row.last_tokens, **row.model_inputs)]

    return _over_rows(reward_model, trees, packer, scores)[0]


@torch.no_grad()
def _over_rows(
    model: nn.Module,
    trees: Sequence[PromptTree],
    packer: Packer,
    compute: Callable[[PackedRow], list[Tensor]],
) -> list[Tensor]:
    """Return what `compute` gives for each packed row, in the order of the trees, on the CPU."""
    device = next(model.parameters()).device
    rows = packer.rows(trees)
    results = [compute(row.to(device, non_blocking=True)) for row in rows]
    return [assemble(rows, _to_cpu(column)) for column in zip(*results, strict=True)]


def _to_cpu(results: Sequence[Tensor]) -> list[Tensor]:
    """Copy the results of all rows at once, because the device would be idle after each copy."""
    sizes = [part.numel() for part in results]
    flat = torch.cat([part.flatten() for part in results]).cpu()
    return [one.view(part.shape) for one, part in zip(flat.split(sizes), results, strict=True)]
