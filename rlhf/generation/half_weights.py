"""Holds a policy's weights in bf16 while it samples under autocast."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from rlhf.models.compat import stays_in_float32


@contextmanager
def half_weights(model: nn.Module) -> Iterator[None]:
    """Under bf16 autocast, hold the weights in bf16 and turn autocast off, until the block ends.

    Autocast leaves the residual stream in fp32, and so the keys of the cache. Then the cache takes
    up to twice the memory, and every layer casts its inputs. Copies in bf16 replace the trained
    parameters in the block. The parameters themselves do not change, because a change of type would
    cut the hooks by which DistributedDataParallel collects gradients. Nothing happens without
    autocast, under fp16, which may overflow in the residual stream, or if the launcher already
    holds the weights in bf16.
    """
    device = next(model.parameters()).device.type
    if not _is_bf16(device):
        yield
        return
    full = [
        (module, name, parameter)
        for prefix, module in model.named_modules()
        for name, parameter in module.named_parameters(prefix, recurse=False)
        if parameter.dtype == torch.float32 and not stays_in_float32(model, name)
    ]
    halves = {id(one): nn.Parameter(one.detach().bfloat16(), False) for _, _, one in full}
    try:
        for module, name, parameter in full:
            setattr(module, name.rpartition(".")[2], halves[id(parameter)])
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for module, name, parameter in full:
            setattr(module, name.rpartition(".")[2], parameter)


def _is_bf16(device: str) -> bool:
    is_on = torch.is_autocast_enabled(device)
    return is_on and torch.get_autocast_dtype(device) == torch.bfloat16
