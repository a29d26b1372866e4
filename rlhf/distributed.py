"""What several processes must agree on: sums over all of them, and who takes which rows."""

from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor

Row = TypeVar("Row")


def sum_over_processes(accelerator: Accelerator, value: Tensor | float) -> Tensor:
    """The sum of a number or tensor over all processes, in fp64 on the CPU."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if accelerator.num_processes == 1:
        return tensor.cpu()
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    return accelerator.reduce(tensor.to(accelerator.device, dtype), reduction="sum").cpu().double()


def max_over_processes(accelerator: Accelerator, value: int) -> int:
    """The largest of the processes' numbers."""
    if accelerator.num_processes == 1:
        return value
    return int(accelerator.gather(torch.tensor([value], device=accelerator.device)).max())


def own_share(accelerator: Accelerator, rows: Sequence[Row]) -> list[Row]:
    """This process's rows of a global batch: every num_processes-th, so all ranks have as many."""
    return list(rows[accelerator.process_index :: accelerator.num_processes])
