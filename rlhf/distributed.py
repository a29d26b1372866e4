"""Joining the processes that the launcher started, and what they must agree on: sums over all of
them, and who takes which rows."""

import os
from collections.abc import Sequence
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import str_to_bool
from torch import Tensor

Row = TypeVar("Row")
Number = TypeVar("Number", int, float)


def start_accelerator() -> Accelerator:
    """accelerate's handle on the device and on the other processes.

    Without a GPU, accelerate 1.15 lets several launched processes train alone, in silence, unless
    told to use the CPU; this tells it, and refuses to go on should it happen nevertheless.

    Raises:
        ValueError: The processes did not join.
    """
    deepspeed = str_to_bool(os.environ.get("ACCELERATE_USE_DEEPSPEED", "false"))
    # cpu=True would make accelerate ignore DeepSpeed.
    on_cpu = not deepspeed and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu)
    check_joined(accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1")))
    return accelerator


def check_joined(num_processes: int, num_launched: int) -> None:
    """ValueError when fewer processes work together than the launcher started."""
    if num_processes != num_launched:
        raise ValueError(
            f"{num_launched} processes were started but only {num_processes} work together; on "
            "CPUs take configs/accelerate/cpu2.yaml, on GPUs give no process more than its own"
        )


def sum_over_processes(accelerator: Accelerator, value: Tensor | float) -> Tensor:
    """The sum of a number or tensor over all processes, in fp64 on the CPU."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if accelerator.num_processes == 1:
        return tensor.cpu()
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    return accelerator.reduce(tensor.to(accelerator.device, dtype), reduction="sum").cpu().double()


def max_over_processes(accelerator: Accelerator, value: Number) -> Number:
    """The largest of the processes' numbers; NaN if one of them is."""
    if accelerator.num_processes == 1:
        return value
    gathered = accelerator.gather(torch.tensor([value], device=accelerator.device))
    return gathered.max().item()


def own_share(accelerator: Accelerator, rows: Sequence[Row]) -> list[Row]:
    """This process's rows of a global batch: every num_processes-th, so all ranks have as many."""
    return list(rows[accelerator.process_index :: accelerator.num_processes])
