"""Joining the processes that the launcher started, and what they must agree on: sums over all of
them, and who takes which rows. What is split between them is the concern of sharding.py."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    InitProcessGroupKwargs,
    is_deepspeed_available,
    str_to_bool,
)
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

Row = TypeVar("Row")
Number = TypeVar("Number", int, float)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""A process that waits for another one gives up after this; the longest rollout is shorter."""

_LOST = ("timed out", "timeout", "connection closed", "connection reset", "connection refused")
"""Words in the errors of torch's backends that say that another process is late or gone."""


def start_accelerator() -> Accelerator:
    """accelerate's handle on the device and on the other processes.

    Without a GPU, accelerate 1.15 lets several launched processes train alone, in silence, unless
    told to use the CPU and gloo; and told to use the CPU it leaves DeepSpeed out, in silence too.
    This tells it what it needs, and refuses to go on should either happen nevertheless.

    Raises:
        ValueError: The processes did not join, or the plugin that was asked for is not at work.
    """
    deepspeed = is_asked_for("ACCELERATE_USE_DEEPSPEED")
    if deepspeed and not is_deepspeed_available():
        raise ValueError(
            "the launcher asked for DeepSpeed, which is not installed: pip install deepspeed, or "
            "take a launcher file without it, such as configs/accelerate/multi_gpu.yaml"
        )
    on_cpu = not torch.accelerator.is_available()
    if deepspeed and on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        _reduce_by_gloo()
    if deepspeed and is_initialized():  # by a stage before, in this same process
        AcceleratorState._reset_state()
    group = InitProcessGroupKwargs(
        backend="gloo" if on_cpu and "LOCAL_RANK" in os.environ else None,
        timeout=COLLECTIVE_TIMEOUT,
    )
    accelerator = Accelerator(
        cpu=on_cpu and not deepspeed,
        deepspeed_plugin=_deepspeed_plugin() if deepspeed else None,
        kwargs_handlers=[group],
    )
    check_launch(accelerator)
    load_models_whole()
    return accelerator


def check_launch(accelerator: Accelerator) -> None:
    """ValueError when the processes or the plugin at work are not those that the launcher asked
    for."""
    check_joined(accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1")))
    check_plugin(accelerator.distributed_type)


def check_joined(num_processes: int, num_launched: int) -> None:
    """ValueError when fewer processes work together than the launcher started."""
    if num_processes != num_launched:
        raise ValueError(
            f"{num_launched} processes were started but only {num_processes} work together; on "
            "CPUs take configs/accelerate/cpu2.yaml, on GPUs give no process more than its own"
        )


def check_plugin(distributed_type: DistributedType) -> None:
    """ValueError when the launcher asked for DeepSpeed or FSDP2 and something else is at work."""
    for variable, wanted, remedy in (
        (
            "ACCELERATE_USE_DEEPSPEED",
            DistributedType.DEEPSPEED,
            "leave use_cpu out of the launcher's settings, as configs/accelerate/cpu2_zero2.yaml "
            "does",
        ),
        (
            "ACCELERATE_USE_FSDP",
            DistributedType.FSDP,
            "it needs GPUs and two processes or more; on CPUs take "
            "configs/accelerate/cpu2_zero3.yaml",
        ),
    ):
        if is_asked_for(variable) and distributed_type != wanted:
            raise ValueError(
                f"the launcher asked for {wanted.value} but {distributed_type.value} is at work: "
                f"{remedy}"
            )
    version = os.environ.get("FSDP_VERSION", "1")
    if is_asked_for("ACCELERATE_USE_FSDP") and version != "2":
        raise ValueError(
            f"fsdp_version is {version}; give 2, as configs/accelerate/fsdp2.yaml does"
        )


TRAINER_STATE = {"use_configured_state": True}
"""accelerator_config of TrainingArguments, which otherwise undo `start_accelerator` and join the
processes anew in their own way."""


def use_accelerator_at_work(arguments: Any) -> None:
    """Has a transformers Trainer take what `start_accelerator` made.

    TrainingArguments make a DeepSpeed plugin of their own, which accelerate refuses as a second
    one; and in one process that sees several GPUs they would spread each batch over all of them.
    """
    arguments.deepspeed_plugin = None
    arguments._n_gpu = min(arguments.n_gpu, 1)


def is_bf16() -> bool:
    """Whether the launcher asked for bfloat16; a Trainer must be told what DeepSpeed was told."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"


def is_on_cpu() -> bool:
    """Whether the launcher's settings, or the lack of anything faster, leave the CPU to work on."""
    return PartialState().device.type == "cpu"


def load_models_whole() -> None:
    """Has from_pretrained load whole weights on the calling process, also under ZeRO-3.

    accelerate and the Trainer tell transformers that ZeRO-3 is at work; from then on every new
    model is split as it is made, by all processes together, the reference policy and the plain
    load of a finished folder too.
    """
    unset_hf_deepspeed_config()


@contextmanager
def naming(accelerator: Accelerator, place: Callable[[], str]) -> Iterator[None]:
    """Says where this process stood when the others did not answer.

    On GPUs, NCCL ends the process by itself, and its own words must do.

    Raises:
        TimeoutError: another process is late or gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in _LOST):
            raise
        raise TimeoutError(
            f"process {accelerator.process_index} of {accelerator.num_processes} waited in vain "
            f"for another one in {place()}; look for the first error in the other processes' "
            f"output ({' '.join(str(error).split())[:200]})"
        ) from error


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


def is_asked_for(variable: str) -> bool:
    """Whether accelerate's launcher said so: ACCELERATE_USE_DEEPSPEED, ACCELERATE_USE_FSDP."""
    return bool(str_to_bool(os.environ.get(variable, "false")))


def _deepspeed_plugin() -> DeepSpeedPlugin:
    """What the launcher's settings say, with the batch and the clip left to each stage.

    Whole weights are loaded and then split: transformers' own way would split a model while it
    loads, and with it the reference policy and the reward model, which are kept whole.
    """
    return DeepSpeedPlugin(
        gradient_accumulation_steps="auto",
        gradient_clipping="auto",
        zero3_init_flag=False,
        zero3_save_16bit_model=True,
    )


def _reduce_by_gloo() -> None:
    """On CPUs DeepSpeed would reduce through shared memory, by C++ that it compiles at the first
    start: minutes, and a start that is cut short leaves a lock for which all later ones wait."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
