"""The launcher files for GPUs, at work on the CPU processes of another launch.

What accelerate's launcher makes of a file is a set of environment variables, so these processes
take those of one file after another, and no file costs a start of its own. Only the files for two
nodes are started by themselves (node.py). Two things differ: FSDP2 is told that the processes have
GPUs, and DeepSpeed's offload keeps torch's AdamW, since its own is C++ that takes minutes to
compile.
"""

import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedType,
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils._pytree import tree_leaves

from rlhf.rewards.models import RewardModel
from rlhf.training import processes, sharding
from rlhf.training.processes import start_accelerator
from stages.ppo.config import PtxSettings
from tests.distributed.chain import LORA, run_chain
from tests.distributed.gradients import (
    Gradients,
    Step,
    fine_tuning_step,
    ppo_step,
    ranking_step,
)
from tests.distributed.one_copy import converted_models
from tests.distributed.rollouts import watched_rollouts
from tests.distributed.streamed import streamed_rollouts

ROOT = Path(__file__).parents[2]
OF_LAUNCHER = ("ACCELERATE_", "FSDP_")
WITH_ADAPTERS = ("fsdp2", "deepspeed_zero3", "two_nodes_fsdp2", "two_nodes_zero3")
"""Files under which adapters are trained too, and not all weights alone."""
Part = Literal["gradients", "chain", "adapters", "stops", "others", "rows", "more rows"]
"""Says what the processes do under a file: one step of each loss, the three stages, or these with
adapters. In the float32 of the launch alone (driver.py): runs that NaN stops, the other stages, and
handfuls of rows."""


def environment_of(name: str) -> dict[str, str]:
    """What `accelerate launch` would tell the processes of a file in configs/accelerate."""
    path = str(ROOT / f"configs/accelerate/{name}.yaml")
    arguments = launch_command_parser().parse_args(["--config_file", path, "program.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ""
        _, told = prepare_deepspeed_cmd_env(arguments)
    elif arguments.use_fsdp or arguments.multi_gpu:
        told = prepare_multi_gpu_env(arguments)
    else:
        _, told = prepare_simple_launcher_cmd_env(arguments)
    return {key: value for key, value in told.items() if key.startswith(OF_LAUNCHER)}


@contextmanager
def launched_as(name: str) -> Iterator[None]:
    """Inside, `start_accelerator` finds what this file's launch would leave."""
    with pytest.MonkeyPatch.context() as patch:
        for key in [key for key in os.environ if key.startswith(OF_LAUNCHER)]:
            patch.delenv(key)
        for key, value in environment_of(name).items():
            patch.setenv(key, value)
        with told_of_gpus():
            yield


@contextmanager
def told_of_gpus() -> Iterator[None]:
    """Inside, `start_accelerator` takes a launch by a file for GPUs on processes without one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "_deepspeed_plugin", _plugin_without_cpp())
        if processes.is_asked_for("ACCELERATE_USE_FSDP"):
            kind = "gloo", DistributedType.MULTI_GPU
            patch.setattr(PartialState, "_prepare_backend", lambda *_, **__: kind)
            patch.setenv("ACCELERATE_TORCH_DEVICE", "cpu")
            if not torch.distributed.is_initialized():  # for GPUs accelerate does it, on CPUs not
                torch.distributed.init_process_group("gloo")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def split_weights(threshold: int) -> None:
    """Has ZeRO-3 split the tiny models' weights: it leaves those of fewer than 100,000 numbers
    whole on every process, which are all that they have.

    Args:
        threshold: Weights of fewer numbers stay whole.
    """
    make_plugin = processes._deepspeed_plugin

    def make_splitting_plugin() -> DeepSpeedPlugin:
        plugin = make_plugin()
        plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = (
            threshold
        )
        return plugin

    processes._deepspeed_plugin = make_splitting_plugin


def _plugin_without_cpp() -> Any:
    make_plugin = processes._deepspeed_plugin

    def make() -> DeepSpeedPlugin:
        plugin = make_plugin()
        plugin.deepspeed_config["zero_force_ds_cpu_optimizer"] = False
        return plugin

    return make


def all_parts(name: str) -> set[Part]:
    """Return what can be done under a file for GPUs."""
    parts: set[Part] = {"gradients", "chain"}
    return {*parts, "adapters"} if name in WITH_ADAPTERS else parts


def run_under(
    name: str, inputs: Path, results: Path, parts: Collection[Part]
) -> tuple[Gradients, dict[str, Any]]:
    """As `run_watched`, with what a launch by this file would leave."""
    with launched_as(name):
        return run_watched(inputs, results, parts)


def run_watched(
    inputs: Path, results: Path, parts: Collection[Part]
) -> tuple[Gradients, dict[str, Any]]:
    """Gradients of PPO with its text, of the reward model and of SFT, by loss and name; and what
    was seen while SFT, reward model and PPO ran one after another."""
    seen: dict[str, Any] = {}
    steps: dict[str, Step] = {}
    if "gradients" in parts:
        steps = {
            "ppo": ppo_step(PtxSettings(coef=0.7, text="unused")),
            "rm": ranking_step(results / "steps"),
            "sft": fine_tuning_step(results / "steps"),
        }
    accelerator = start_accelerator()
    seen["at work"] = [accelerator.distributed_type.value, accelerator.mixed_precision]
    if "chain" in parts:
        with (
            scores_watched() as seen["scored in"],
            models_watched() as seen["prepared"],
            watched_rollouts() as seen["rollouts"],
        ):
            run_chain(inputs, results)
    if "adapters" in parts:
        run_chain(inputs, results / "adapters", lora=LORA)
    if accelerator.distributed_type == DistributedType.FSDP:
        seen["streamed"] = streamed_rollouts()
        seen["converted"] = converted_models(results / "halves")
    return {
        f"{loss}/{key}": value.float().contiguous()
        for loss, step in steps.items()
        for key, value in step.gradients.items()
    }, seen


@contextmanager
def models_watched() -> Iterator[list[dict[str, Any]]]:
    """Has noted, of each model that a stage prepares, how many of its modules FSDP2 gathers one at
    a time, and the types of what it returns."""
    seen: list[dict[str, Any]] = []
    prepare = sharding.prepare

    def prepare_and_note(*arguments: Any) -> Any:
        wrapped, optimizer = prepare(*arguments)
        units = sum(isinstance(module, FSDPModule) for module in wrapped.modules())
        note: dict[str, Any] = {"units": units, "types": []}
        seen.append(note)

        def note_types(_module: Any, _inputs: Any, outputs: Any) -> None:
            found = [one for one in tree_leaves(outputs) if isinstance(one, Tensor)]
            note["types"] = sorted({*note["types"], *(str(one.dtype) for one in found)})

        wrapped.register_forward_hook(note_types)
        return wrapped, optimizer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "prepare", prepare_and_note)
        yield seen


@contextmanager
def scores_watched() -> Iterator[list[str]]:
    """Has the types of autocast noted in which PPO scores."""
    types: list[str] = []
    score = RewardModel.score

    def note_and_score(*arguments: Any) -> Any:
        is_on = torch.is_autocast_enabled("cpu")
        types.append(str(torch.get_autocast_dtype("cpu")) if is_on else "none")
        return score(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RewardModel, "score", note_and_score)
        yield types
