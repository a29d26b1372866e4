"""Holds all uses of private names of accelerate, DeepSpeed, torch and transformers in this wing.

There is no public way to do this. Each section names the version that it was tried with; try a new
version here first. Functions import DeepSpeed only when they run under it.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from rlhf.training.parameters import check_shapes

# accelerate 1.15.0


def forget_launch() -> None:
    """Make accelerate set up DeepSpeed again, after an earlier stage in this process."""
    AcceleratorState._reset_state()


# The attribute is transformers' (5.23.0); accelerate 1.15.0 reads it.


def layer_names(module: nn.Module) -> list[str]:
    """Return the class names of the layers that a model says must not be split."""
    return [*(getattr(module, "_no_split_modules", None) or ())]


def set_layer_names(module: nn.Module, names: list[str]) -> None:
    """Set the class names of the modules that FSDP2 gathers one at a time."""
    module._no_split_modules = names  # type: ignore[assignment]


# transformers 5.23.0


def use_one_device(arguments: Any) -> None:
    """Keep a Trainer with these TrainingArguments from using all GPUs that its process sees."""
    arguments._n_gpu = min(arguments.n_gpu, 1)


# torch 2.13.0


def make_root(model: FSDPModule) -> None:
    """Make a module the root of its FSDP2 modules. By default the first that runs is the root."""
    model._get_fsdp_state()._lazy_init()


def drops_after_forward(module: FSDPModule) -> bool:
    """Return whether an FSDP2 module drops its weights after a pass. Call `make_root` before."""
    groups = module._get_fsdp_state()._fsdp_param_groups
    return any(group.post_forward_mesh_info is not None for group in groups)


# DeepSpeed 0.19.8, stages 2 and 3


def reduce_by_gloo() -> None:
    """Make DeepSpeed use gloo on CPUs instead of its own shared memory operation.

    It compiles that C++ operation at the first start, which takes minutes. An interrupted start
    leaves a lock for which all later starts wait.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def is_zero3(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-3 splits this parameter."""
    return hasattr(parameter, "ds_id")


def is_zero2(parameter: nn.Parameter) -> bool:
    """Return whether ZeRO-1 or ZeRO-2 splits the gradient and the fp32 copy of this parameter."""
    return hasattr(parameter, "_hp_mapping")


def zero2_gradient(parameter: Any) -> Tensor | None:
    """Return this process's shard of a gradient under ZeRO-2; None if another process has it."""
    if parameter._hp_mapping is None:
        return None
    shard: Tensor = parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    return shard


def set_zero3_weights(parameter: Any, shard: Tensor) -> None:
    """Write this process's shard of a parameter. All processes must call this."""
    from deepspeed.runtime.zero import GatheredParameters

    count = torch.distributed.get_world_size()
    whole = shard.new_empty(count * shard.numel())
    torch.distributed.all_gather_into_tensor(whole, shard.contiguous())
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(whole[: parameter.ds_numel].view(parameter.ds_shape))


def forget_empty_steps(engine: Any) -> None:
    """Reset Adam's step count where its moments have seen only zeros, as if no step was taken."""
    for state in engine.optimizer.optimizer.state.values():
        if "exp_avg_sq" in state and not state["exp_avg_sq"].any():
            step = state["step"]  # a tensor in torch's AdamW, a number in DeepSpeed's CPU Adam
            state["step"] = torch.zeros_like(step) if isinstance(step, Tensor) else 0


def accumulated_gradients(engine: Any) -> list[Tensor]:
    """Return the buffers to which DeepSpeed adds the gradients of the next pass.

    With offload_optimizer, `zero2_gradient` reads copies of them made at the last pass. Zeros
    written to the copies would not last.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return [optimizer.grad_partitions_flat_buffer]
    if not optimizer.cpu_offload:
        return []
    compact = [group.flat_partition for group in optimizer.averaged_gradients.values()]
    return [*optimizer.accumulated_grads_in_cpu.values(), *compact]


@contextmanager
def gathered_by_deepspeed(engine: Any, part: nn.Module) -> Iterator[None]:
    """Hold all weights of a part of the engine's module in every process inside the block.

    DeepSpeed's hooks would drop each module's weights after its first use, so they are removed.
    """
    from deepspeed.runtime.zero import GatheredParameters

    offload = engine.optimizer.parameter_offload
    parameters: list[Any] = list(part.parameters())
    with GatheredParameters(parameters):
        for parameter in parameters:
            parameter.ds_active_sub_modules.clear()
        for hooks in (offload.forward_hooks, offload.backward_hooks):
            for hook in hooks:
                hook.remove()
            hooks.clear()
        try:
            yield
        finally:
            offload._register_deepspeed_module(offload.module)


@contextmanager
def some_gathered_by_deepspeed(parameters: Iterable[Any]) -> Iterator[None]:
    """Hold those of the parameters that ZeRO-3 splits in every process inside the block.

    The hooks stay, so no module may run inside. Parameters that DeepSpeed holds whole already, such
    as small ones, stay whole."""
    split = [one for one in parameters if is_zero3(one) and one.ds_status.name == "NOT_AVAILABLE"]
    if not split:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(split):
        yield


# DeepSpeed writes its own checkpoints as pickles. Its ZeRO optimizers also have state_dict and
# load_state_dict, whose dictionaries are turned here into names, tensors and plain values.

_KEYS = {
    2: ("single_partition_of_fp32_groups", "base_optimizer_state"),
    3: ("fp32_flat_groups", "optimizer_state_dict"),
}
"""Maps a stage to DeepSpeed's names for this process's fp32 weights, and for the state of the
optimizer that steps them. deepspeed.checkpoint.constants has the same names."""


def zero_state(optimizer: Any) -> dict[str, Any]:
    """Return a ZeRO optimizer's state in this process, without copying it.

    Returns:
        "weights": fp32 tensors (numbers of one flat group,) by the number of the group; "moments":
        the optimizer's state of each; "groups": the optimizer's parameter groups.
    """
    weights, state = _read(optimizer)
    moments = {str(number): of_one for number, of_one in state["state"].items()}
    return {"weights": weights, "moments": moments, "groups": state["param_groups"]}


def load_zero_state(optimizer: Any, state: dict[str, Any]) -> None:
    """Load what `zero_state` returned, and set the model's weights from it.

    All processes must call this.

    Raises:
        ValueError: The state is of another model, or of another split.
    """
    whole = optimizer.state_dict()
    of_weights, of_moments = _KEYS[int(whole["zero_stage"])]
    present, _ = _read(optimizer)
    check_shapes(state["weights"], present)
    whole[of_weights] = [state["weights"][name] for name in present]
    whole[of_moments] = {
        "state": {int(number): of_one for number, of_one in state["moments"].items()},
        "param_groups": state["groups"],
    }
    # DeepSpeed expects the states of all processes, and takes its own by number.
    own = {torch.distributed.get_rank(): whole}
    if int(whole["zero_stage"]) == 3:
        optimizer.checkpoint_event_prologue()
        optimizer.load_state_dict(own)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.load_state_dict(own, load_from_fp32_weights=True)
        optimizer.update_lp_params()


def _read(optimizer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the fp32 weights by number, and the inner optimizer's state in torch's form."""
    whole = optimizer.state_dict()
    of_weights, of_moments = _KEYS[int(whole["zero_stage"])]
    return {str(i): flat for i, flat in enumerate(whole[of_weights])}, whole[of_moments]
