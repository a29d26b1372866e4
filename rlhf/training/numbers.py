"""Copies numbers from a device to the host."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_floats(values: Sequence[Tensor | float]) -> list[float]:
    """Return numbers as floats; the host waits once for all those on the device.

    Args:
        values: Python numbers, and tensors with one element. Tensors that are not on the CPU must
            be on one device.
    """
    on_device = [
        value.detach().reshape(())
        for value in values
        if isinstance(value, Tensor) and value.device.type != "cpu"
    ]
    if not on_device:
        return [float(value) for value in values]
    # float64 holds every float32 and every count. Apple's devices have no float64.
    dtype = torch.float32 if on_device[0].device.type == "mps" else torch.float64
    read = iter(torch.stack([value.to(dtype) for value in on_device]).tolist())
    return [
        next(read) if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)
        for value in values
    ]
