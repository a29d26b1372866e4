"""Make responses end where the workload says, whichever program samples them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

SURE = 1e4
"""Logit that makes a token certain; its negative makes a token impossible. bfloat16 can hold
both."""


def end_responses_at(
    model: nn.Module, positions: Sequence[int] | None, end_id: int, pad_id: int
) -> None:
    """Make the end token certain at these positions of a sequence and impossible elsewhere.

    Positions work for padded, packed and continuously batched passes alike. None means that no
    response ends. The padding token is never sampled, since TRL takes it for the end of a response.
    Only values change. The gradients of these two columns are 0, as they should be for a
    probability of 0, or of 1 at the target.

    Args:
        model: a causal LM whose forward is called with position_ids. A call without them, such as
            a probe of the model, is left as it is.
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
    """Make torch.multinomial, which TRL samples with, return the likeliest token.

    Then both sides give the same responses.
    """

    def likeliest(probabilities: Tensor, *_: Any, **__: Any) -> Tensor:
        return probabilities.argmax(-1, keepdim=True)

    return mock.patch("torch.multinomial", likeliest)
