"""Moves models off the device between uses, and frees memory that is no longer used."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import nn


def free_unused() -> None:
    """Free the memory of objects that nothing uses any more.

    A model, its optimizer and its schedule refer to each other. So they stay in memory until
    Python's garbage collector looks for cycles.
    """
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def on_device(models: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
    """Hold models on the device inside the block and in CPU memory outside, if `offload` is set.

    Otherwise, or if the device is the CPU, nothing moves. Weights that are frozen take their place
    in CPU memory again. So pages that processes share stay shared, and nothing is copied back.
    """
    if not offload or device.type == "cpu":
        yield
        return
    frozen = [
        (weight, weight.data)
        for model in models
        for weight in model.parameters()
        if type(weight) is nn.Parameter and not weight.requires_grad  # 4 bits have more than data
    ]
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for weight, on_host in frozen:
            with suppress(RuntimeError):  # no plain tensor on the device: it is copied back below
                weight.data = on_host
        for model in models:
            model.to("cpu")
