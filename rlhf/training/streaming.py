"""Gathers a few weights of a split model at a time, for callers that read each of them once.

`sharding.whole_weights` gathers a whole model, which a pass needs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.training import compat


@contextmanager
def gathered(
    model: nn.Module, names: Sequence[str], dtype: torch.dtype | None = None
) -> Iterator[None]:
    """Hold these weights of a model whole in every process until the end of the block.

    Inside, each is found in its usual place in the model. All processes must name the same weights
    in the same order, and no module may run inside. Nothing happens to weights that are whole
    anyway.

    Args:
        names: The names of the parameters.
        dtype: The type that FSDP2 gives to weights for a pass; its shards are rounded to it before
            they are gathered, as for a pass. ZeRO-3 holds its shards in that type. None means the
            type of the shards.
    """
    parameters = {name: model.get_parameter(name) for name in names}
    shards: dict[str, Any] = {
        name: one for name, one in parameters.items() if isinstance(one, DTensor)
    }
    try:
        with compat.some_gathered_by_deepspeed(parameters.values()):
            for name, shard in shards.items():
                whole = shard.detach().to(dtype or shard.dtype).full_tensor()
                _set_parameter(model, name, nn.Parameter(whole, requires_grad=False))
            yield
    finally:
        for name, shard in shards.items():
            _set_parameter(model, name, shard)


def whole_shape(parameter: Tensor) -> torch.Size:
    """Return the shape of a whole parameter, even if it is split."""
    return getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty tensor


def _set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, own_name = name.rpartition(".")
    setattr(model.get_submodule(owner), own_name, parameter)
