"""Linear layers on a few rows, as decoding has them, on the CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor, nn

ROWS = range(4, 49)
"""Rows for which the product is turned round. On two threads it is two to three times as fast from
8 to 32 of them, and slower beyond 64 (docs/experiments); on one thread nothing is gained."""


@contextmanager
def thin_products(model: nn.Module) -> Iterator[None]:
    """Inside, linear layers in fp32 on the CPU multiply from the left where that is faster.

    With x of few rows, the library behind x W^T shares the work among its threads so badly that two
    are slower than one. The same product as (W x^T)^T it shares well. Results differ by rounding.
    """
    turned: list[nn.Linear] = []
    if torch.get_num_threads() > 1:
        turned = [module for module in model.modules() if _is_plain(module)]
    for module in turned:
        vars(module)["forward"] = partial(_linear, module)
    try:
        yield
    finally:
        for module in turned:
            del vars(module)["forward"]


def _is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    return (
        type(module) is nn.Linear
        and "forward" not in vars(module)  # someone else's wrapper
        and module.weight.device.type == "cpu"
        and module.weight.dtype == torch.float32
    )


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) not in ROWS or torch.is_autocast_enabled("cpu"):
        return nn.functional.linear(x, module.weight, module.bias)
    product = (module.weight @ rows.T).T.contiguous().view(*x.shape[:-1], -1)
    return product if module.bias is None else product + module.bias
