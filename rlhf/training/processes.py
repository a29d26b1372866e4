"""Joins the processes that the launcher started, sums over them, and divides rows among them.

sharding.py handles models that are split between processes."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import is_initialized
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    is_deepspeed_available,
    str_to_bool,
)
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf.training import compat
from rlhf.training.numbers import to_floats

Row = TypeVar("Row")
Result = TypeVar("Result")
Number = TypeVar("Number", int, float)

COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Time that a process waits for another before it fails. It must exceed the longest rollout."""

_LOST = ("timed out", "timeout", "connection closed", "connection reset", "connection refused")
"""Parts of torch's error messages that mean another process is late or gone."""


def start_accelerator() -> Accelerator:
    """Return accelerate's object for the device and the other processes.

    accelerate 1.15 has two traps without a GPU, and gives no warning of either. Unless it is told
    to use the CPU and gloo, each process trains alone. If it is told to use the CPU, it leaves
    DeepSpeed out. This function prevents both, and raises an error if one happens anyway.

    Raises:
        ValueError: The processes did not join, or the requested plugin is not in use.
    """
    deepspeed = is_asked_for("ACCELERATE_USE_DEEPSPEED")
    if deepspeed and not is_deepspeed_available():
        raise ValueError(
            "the launcher asked for DeepSpeed, which is not installed: pip install deepspeed, or "
            "take a launcher file without it, such as configs/accelerate/multi_gpu.yaml"
        )
    use_share_of_cores()
    on_cpu = not torch.accelerator.is_available()
    if deepspeed and on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        compat.reduce_by_gloo()
    if deepspeed and is_initialized():  # an earlier stage in this process set it up
        compat.forget_launch()
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
    if accelerator.distributed_type == DistributedType.FSDP:
        keep_single_precision(accelerator)
    return accelerator


def keep_single_precision(accelerator: Accelerator) -> None:
    """Make FSDP2 add gradients over processes in float32 and return what the model computed.

    accelerate 1.15 asks for bfloat16 in both places. It would round log-probabilities, values and
    scores, which our passes compute in float32, to three digits.
    """
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        compute = plugin.mixed_precision_policy.param_dtype
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=compute, reduce_dtype=torch.float32
        )


def warn_of_float32(accelerator: Accelerator, dtype: str = "float32") -> None:
    """Warn if a model is about to be trained in float32 on an accelerator, where that is slow.

    Args:
        dtype: Type of the model's weights.
    """
    device = accelerator.device.type
    if device == "cpu" or accelerator.mixed_precision != "no" or dtype != "float32":
        return
    if accelerator.is_main_process:
        warnings.warn(
            f'the launcher says mixed_precision "no", so this run computes in float32 on {device}, '
            "much slower and in more memory than in bfloat16; start it with `make STAGE "
            "ACCELERATE=configs/accelerate/gpu.yaml` or `accelerate launch --config_file "
            "configs/accelerate/gpu.yaml`, or set mixed_precision: bf16 in your launcher file",
            stacklevel=3,
        )


def use_share_of_cores() -> None:
    """Give torch one thread per core of this process's share, unless OMP_NUM_THREADS was given."""
    if not _are_threads_given():
        num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        torch.set_num_threads(max(1, _num_cores() // num_processes))


def _num_cores() -> int:
    """Return the number of cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _are_threads_given() -> bool:
    """Return whether the user set OMP_NUM_THREADS.

    The launchers of accelerate and torch set it to 1 if the user did not. The user's own value is
    in the environment of the launcher's process.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        return False
    if not {"ACCELERATE_MIXED_PRECISION", "LOCAL_RANK"} & set(os.environ):
        return True
    try:
        return "OMP_NUM_THREADS" in psutil.Process(os.getppid()).environ()
    except psutil.Error:
        return True


def check_launch(accelerator: Accelerator) -> None:
    """Raise ValueError unless the processes and the plugin in use are those the launcher wanted."""
    check_joined(accelerator.num_processes, int(os.environ.get("WORLD_SIZE", "1")))
    check_plugin(accelerator.distributed_type)


def check_joined(num_processes: int, num_launched: int) -> None:
    """Raise ValueError if fewer processes work together than the launcher started."""
    if num_processes != num_launched:
        raise ValueError(
            f"{num_launched} processes were started but only {num_processes} work together; on "
            "CPUs take configs/accelerate/cpu2.yaml, on GPUs give no process more than its own"
        )


def check_plugin(distributed_type: DistributedType) -> None:
    """Raise ValueError if the launcher asked for DeepSpeed or FSDP2 and got something else."""
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
"""The accelerator_config for TrainingArguments. Without it they replace what `start_accelerator`
made."""


def share_accelerator(arguments: Any) -> None:
    """Make a transformers Trainer use what `start_accelerator` made.

    TrainingArguments make a second DeepSpeed plugin, which accelerate refuses. In one process that
    sees several GPUs, they would also spread each batch over all of them.
    """
    arguments.deepspeed_plugin = None
    compat.use_one_device(arguments)


def is_bf16() -> bool:
    """Return whether the launcher asked for bfloat16. A Trainer must get the same as DeepSpeed."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16"


def is_on_cpu() -> bool:
    """Return whether models run on the CPU, by the launcher's settings or for lack of a GPU."""
    return PartialState().device.type == "cpu"


def load_models_whole() -> None:
    """Make from_pretrained load whole weights in the calling process, also under ZeRO-3.

    accelerate and the Trainer tell transformers that ZeRO-3 is in use. From then on all processes
    together split every new model as it is made. That would include the reference policy, and a
    finished folder that is only read.
    """
    unset_hf_deepspeed_config()


@contextmanager
def naming(accelerator: Accelerator, place: Callable[[], str]) -> Iterator[None]:
    """Say at which place this process waited, if another one is late or gone.

    On GPUs, NCCL ends the process by itself, so only NCCL's message appears.

    Raises:
        TimeoutError: Another process is late or gone.
    """
    try:
        yield
    except RuntimeError as error:
        if not any(words in str(error).lower() for words in _LOST):
            raise
        raise TimeoutError(
            f"process {accelerator.process_index} of {accelerator.num_processes} waited too "
            f"long for another one in {place()}; look for the first error in the other processes' "
            f"output ({' '.join(str(error).split())[:200]})"
        ) from error


def sum_over_processes(accelerator: Accelerator, value: Tensor | float) -> Tensor:
    """Return the sum of a number or tensor over all processes, in fp64 on the CPU."""
    tensor = torch.as_tensor(value, dtype=torch.float64)
    if accelerator.num_processes == 1:
        return tensor.cpu()
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    return accelerator.reduce(tensor.to(accelerator.device, dtype), reduction="sum").cpu().double()


def sums_over_processes(
    accelerator: Accelerator, values: Mapping[str, Tensor | float]
) -> dict[str, float]:
    """Return the sum of each value over all processes, which have values of the same names."""
    own = torch.tensor(to_floats(list(values.values())), dtype=torch.float64)
    return dict(zip(values, sum_over_processes(accelerator, own).tolist(), strict=True))


def max_over_processes(accelerator: Accelerator, value: Number) -> Number:
    """Return the largest of the processes' numbers; NaN if one of them is NaN."""
    if accelerator.num_processes == 1:
        return value
    gathered = accelerator.gather(torch.tensor([value], device=accelerator.device))
    return gathered.max().item()


def broadcast_from_first(value: bool) -> bool:
    """Return the first process's value in all processes. They must have joined."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return value
    assert is_initialized(), "start_accelerator comes first"
    values = [value]
    broadcast_object_list(values)
    return values[0]


def gather_from_all(work: Callable[[], Result], kind: type[Exception]) -> list[Result]:
    """Call `work` in every process and return all results, in the order of the processes.

    Args:
        work: Returns something small, since every process gets the results of all.
        kind: The errors that `work` may raise. The error of one process is raised in all, since the
            others would wait for it.
    """
    result, problem = None, None
    try:
        result = work()
    except kind as error:
        problem = str(error)
    outcomes: list[tuple[Any, str | None]] = gather_object([(result, problem)])
    for _, one in outcomes:
        if one is not None:
            raise kind(one)
    return [one for one, _ in outcomes]


def own_share(accelerator: Accelerator, rows: Sequence[Row]) -> list[Row]:
    """Return this process's rows of a global batch: every num_processes-th row."""
    return list(rows[accelerator.process_index :: accelerator.num_processes])


def is_asked_for(variable: str) -> bool:
    """Return whether accelerate's launcher set a variable, such as ACCELERATE_USE_DEEPSPEED."""
    return bool(str_to_bool(os.environ.get(variable, "false")))


def _deepspeed_plugin() -> DeepSpeedPlugin:
    """Make the plugin from the launcher's settings; each stage sets its own batch and clip.

    Weights are loaded whole and split afterwards. transformers would split a model while it loads.
    That would also split the reference policy and the reward model, which stay whole.
    """
    return DeepSpeedPlugin(
        gradient_accumulation_steps="auto",
        gradient_clipping="auto",
        zero3_init_flag=False,
        zero3_save_16bit_model=True,
    )
