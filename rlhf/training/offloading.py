"""Models that leave the device between uses, and memory that no name holds any more."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn


def free_unused() -> None:
    """Gives back the memory of what no name holds any more.

    A Trainer, its model and its optimizer hold each other, so they outlive the function that made
    them until Python looks for such circles.
    """
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


@contextmanager
def on_device(models: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
    """With `offload`, models are on the device inside and in CPU memory outside; else they stay
    where they are. Where the device is the CPU, nothing moves."""
    if not offload or device.type == "cpu":
        yield
        return
    try:
        for model in models:
            model.to(device)
        yield
    finally:
        for model in models:
            model.to("cpu")
