"""Speeds up linear layers on the CPU for the few rows of a decoding step."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

TRANSPOSED_ROWS = range(4, 49)
"""Numbers of rows for which the transposed product is used. On two threads it is two to three times
as fast for 8 to 32 rows, and slower beyond 64 (docs/experiments). One thread gains nothing."""


@contextmanager
def transposed_linear_layers(model: nn.Module) -> Iterator[None]:
    """Compute fp32 linear layers on the CPU as (W x^T)^T in the block, where that is faster.

    If x has few rows, torch's library divides x W^T so badly that two threads are slower than one.
    It divides (W x^T)^T well. The results differ by rounding.
    """
    transposed: list[nn.Linear] = []
    if torch.get_num_threads() > 1:
        transposed = [module for module in model.modules() if _is_plain(module)]
    for module in transposed:
        vars(module)["forward"] = partial(_linear, module)
    try:
        yield
    finally:
        for module in transposed:
            del vars(module)["forward"]


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)  # another library may have wrapped it
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) not in TRANSPOSED_ROWS or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, module.weight, module.bias)
    product = (module.weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
    return product if module.bias is None else product + module.bias
