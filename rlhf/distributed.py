"""Joining the processes that the launcher started."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import str_to_bool


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
