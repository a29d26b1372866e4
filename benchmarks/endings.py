"""Responses that end where the workload says, whoever samples them and in whatever order."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

SURE = 1e4
"""A logit that leaves no doubt, and whose negative leaves no chance; below bfloat16's limit."""


def end_responses_at(
    model: nn.Module, positions: Sequence[int] | None, end_id: int, pad_id: int
) -> None:
    """The end token is certain at these positions of a sequence and impossible elsewhere.

    By positions, so that it holds for padded, packed and continuously batched passes alike. None
    means that no response ends. The padding token, which TRL takes for the end of a response, is
    never sampled. Only values change: gradients of these two columns are 0, as they should be
    (probability 0, or 1 at the target).

    Args:
        model: a causal LM whose forward is called with position_ids; a call without, such as a
            probe of the model, is left as it is.
    """
    ends = torch.tensor(list(positions or []), dtype=torch.long)

    def set_logits(_: nn.Module, __: Any, inputs: dict[str, Any], output: Any) -> None:
        where = inputs.get("position_ids")
        if where is None:
            return
        logits = output.logits.detach()
        keep = inputs.get("logits_to_keep", 0)
        if isinstance(keep, Tensor):
            where = where[:, keep]
        elif keep:
            where = where[:, -keep:]
        is_end = torch.isin(where + 1, ends.to(where.device))
        logits[..., end_id] = torch.where(is_end, SURE, -SURE).to(logits.dtype)
        logits[..., pad_id] = -SURE

    model.register_forward_hook(set_logits, with_kwargs=True)


def greedy_draws() -> AbstractContextManager[Any]:
    """Within it every draw of torch.multinomial, by which TRL draws, is the likeliest token: then
    both sides give the same responses."""

    def likeliest(probabilities: Tensor, *_: Any, **__: Any) -> Tensor:
        return probabilities.argmax(-1, keepdim=True)

    return mock.patch("torch.multinomial", likeliest)
