"""Reads and changes gradients and weights, whatever is split between the processes.

    launcher    weights      gradients    optimizer states
    DDP         whole        whole        whole
    ZeRO-2      whole        in shards    in shards
    ZeRO-3      in shards    in shards    in shards
    FSDP2       in shards    in shards    in shards

A *shard* is the part that this process holds. step.py uses these functions, so that its loop reads
the same under each launcher. Code that runs the model without a gradient goes inside
`whole_weights`.

DeepSpeed would clip both models of PPO by one norm and hide the gradients. So its clip is off, and
this module reads and writes its shards. Functions import DeepSpeed only when they run under it.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf.training import compat
from rlhf.training.numbers import to_floats
from rlhf.training.processes import sum_over_processes


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def shards_gradients(accelerator: Accelerator) -> bool:
    """Return whether each process has only a part of the gradients."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def shards_weights(accelerator: Accelerator) -> bool:
    """Return whether each process has only a part of the weights."""
    if is_deepspeed(accelerator):
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def computes_on_half_weights(accelerator: Accelerator) -> bool:
    """Return whether the launcher gives the model that it wraps weights in bfloat16 for its passes.

    Autocast, in contrast, leaves the weights in float32 and casts what some operations read."""
    return shards_gradients(accelerator) and accelerator.mixed_precision == "bf16"


def split_by(accelerator: Accelerator) -> str | None:
    """Return the name of what splits gradients between processes, such as "ZeRO-3", or None."""
    if is_deepspeed(accelerator):
        stage = accelerator.state.deepspeed_plugin.zero_stage
        device = _offload_settings(accelerator, "offload_optimizer").get("device", "none")
        # Offload uses another Adam, which rounds differently.
        return f"ZeRO-{stage}" if device == "none" else f"ZeRO-{stage} with offload_optimizer"
    return "FSDP2" if accelerator.distributed_type == DistributedType.FSDP else None


def why_not_saved(accelerator: Accelerator) -> str:
    """Return why no checkpoint can hold what this launcher splits; empty if one can."""
    kind = split_by(accelerator)
    if kind is None:
        return ""
    if accelerator.mixed_precision == "fp16":
        return f"{kind} in fp16 changes a loss scale"
    if not is_deepspeed(accelerator):
        return ""
    if accelerator.state.deepspeed_plugin.zero_stage not in (2, 3):
        return f"{kind} keeps other optimizers than ZeRO-2 and ZeRO-3"
    for name in ("offload_optimizer", "offload_param"):
        offload = _offload_settings(accelerator, name)
        if offload.get("device") == "nvme":
            return f"{name} keeps weights or moments in files of its own"
        if offload.get("ratio", 1.0) != 1.0:
            return f"{name} with a ratio steps some weights by a second optimizer"
    return ""


def _offload_settings(accelerator: Accelerator, name: str) -> dict[str, Any]:
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    return settings.get("zero_optimization", {}).get(name) or {}


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return the model wrapped for the launcher, and the optimizer over its parameters."""
    if is_deepspeed(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = 1  # required, but never read
        settings["gradient_clipping"] = 0.0
    elif accelerator.distributed_type == DistributedType.FSDP:
        name_layers(model)
    return accelerator.prepare(model, optimizer)


def name_layers(model: nn.Module) -> None:
    """Tell accelerate which modules FSDP2 gathers one at a time: the layers of every model inside.

    accelerate asks only the outermost module, which may be ours and name no layers. FSDP2 would
    then gather the whole model for each pass, and keep it.
    """
    compat.set_layer_names(model, sorted({type(layer).__name__ for layer in layers_of(model)}))


def layers_of(model: nn.Module) -> list[nn.Module]:
    """Return the layers of every model inside, which FSDP2 splits and gathers one at a time."""
    named = {name for module in model.modules() for name in compat.layer_names(module)}
    return [module for module in model.modules() if type(module).__name__ in named]


def autocast_unwrapped(accelerator: Accelerator) -> AbstractContextManager[object]:
    """Return the launcher's mixed precision for a model that the launcher did not wrap.

    DeepSpeed casts only the weights that it wraps, and accelerate's autocast does nothing under it.
    A frozen model would stay in float32, several times slower than the policy.
    """
    if is_deepspeed(accelerator) and accelerator.mixed_precision == "bf16":
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return accelerator.autocast()


@contextmanager
def one_pass(accelerator: Accelerator, model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Run the forward and backward pass of one row inside; `is_last` marks the step's last row.

    Whole gradients are exchanged in the last pass only, shards in every pass. In both cases all
    processes must run the same number of passes.
    """
    if is_deepspeed(accelerator):
        model.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
        yield
    elif is_last or shards_gradients(accelerator):
        yield
    else:
        with accelerator.no_sync(model):
            yield


def backward(accelerator: Accelerator, model: nn.Module, loss: Tensor) -> None:
    """Add the gradient of the loss, averaged over processes and not summed."""
    # accelerate's own backward would also take DeepSpeed's step.
    if is_deepspeed(accelerator):
        model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]
    else:
        accelerator.backward(loss)


def clip_gradients(
    accelerator: Accelerator, parameters: Iterable[nn.Parameter], max_norm: float
) -> Tensor | float:
    """Scale gradients down to a total norm of at most `max_norm`; return the norm before.

    Call it after the last pass and before the step. The norm of whole gradients stays on the
    device, so that the host need not wait for it yet.
    """
    parameters = list(parameters)
    if not shards_gradients(accelerator):
        return accelerator.clip_grad_norm_(parameters, max_norm)
    squares = [(one * one).sum(dtype=torch.float64) for one in map(_local_gradient, parameters)]
    (square,) = _over_processes(accelerator, [_total(squares)])
    before = math.sqrt(square)
    if before > max_norm:
        # The 1e-6 makes this equal to torch's clip_grad_norm_.
        scale_gradients(parameters, max_norm / (before + 1e-6))
    return before


def drop_gradients(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> None:
    """Drop the gradients of parameters that must not change, after the last pass."""
    if is_deepspeed(accelerator):
        scale_gradients(parameters, 0.0)
    else:
        for parameter in parameters:
            parameter.grad = None


def take_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    frozen: Collection[int] = (),
) -> None:
    """Take one step of the optimizer. DeepSpeed drops the gradients; otherwise they remain.

    Args:
        frozen: Numbers in `make_optimizer` of the modules that must not change, whose gradients
            were dropped. Under DeepSpeed a gradient of 0 is not enough: weight decay would move
            them, and Adam's moments would decay.
    """
    if not is_deepspeed(accelerator):
        optimizer.step()
        return
    for group in optimizer.param_groups:
        if group["module"] in frozen:
            group["lr"] = 0.0  # the schedule sets it again at its next step
    model.step()  # type: ignore[operator]
    if frozen:
        compat.forget_empty_steps(model)


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return each gradient flat in fp32: this process's shard, or all of it if it is whole.

    A parameter without a gradient has zeros. Under DeepSpeed, call this only after the last pass
    and before the step.
    """
    return [_local_gradient(parameter) for parameter in parameters]


def set_local_gradients(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    """Write back gradients from `local_gradients`, except where a parameter has none."""
    for parameter, value in zip(parameters, values, strict=True):
        if not parameter.requires_grad:
            continue
        if compat.is_zero3(parameter):
            from deepspeed.utils import safe_set_local_grad

            safe_set_local_grad(parameter, value)
        elif (place := _place_of_gradient(parameter)) is not None:
            place.copy_(value.view_as(place))


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply gradients, or this process's shards. A factor of 0 also replaces NaN by 0.

    Where reading a gradient copies it, one copy exists at a time.
    """
    for parameter in parameters:
        gradient = _local_gradient(parameter)
        scaled = gradient.zero_() if factor == 0 else gradient.mul_(factor)
        set_local_gradients([parameter], [scaled])


def zero_gradients(
    accelerator: Accelerator, model: nn.Module, parameters: Iterable[nn.Parameter]
) -> None:
    """Set the gradients to zero between two passes of one step.

    Args:
        parameters: All trained parameters.
    """
    scale_gradients(parameters, 0.0)
    if is_deepspeed(accelerator):
        for buffer in compat.accumulated_gradients(model):
            buffer.zero_()


def inner_products(
    accelerator: Accelerator, pairs: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]
) -> list[float]:
    """Return the inner product over all processes of each pair of gradients.

    The gradients come from `local_gradients`.
    """
    return _over_processes(accelerator, [_own_dot(some, others) for some, others in pairs])


def _own_dot(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor | float:
    return _total([(a * b).sum(dtype=torch.float64) for a, b in zip(some, others, strict=True)])


def _total(parts: list[Tensor]) -> Tensor | float:
    return torch.stack(parts).sum() if parts else 0.0


def _over_processes(accelerator: Accelerator, own: Sequence[Tensor | float]) -> list[float]:
    """Sum numbers over the processes that share gradients."""
    values = to_floats(own)
    if not shards_gradients(accelerator):
        return values
    return sum_over_processes(accelerator, torch.tensor(values, dtype=torch.float64)).tolist()


@contextmanager
def whole_weights(
    accelerator: Accelerator, model: nn.Module, part: nn.Module | None = None
) -> Iterator[None]:
    """Gather all weights once and hold them in every process until the end of the block.

    Inside, no module gathers or drops weights, so processes may run the model independently of each
    other. Nothing happens if weights are whole anyway.

    Args:
        model: The model in the launcher's wrapper.
        part: A module inside the model. Only its weights are gathered then, and nothing else of
            the model may run in the block.
    """
    if not shards_weights(accelerator):
        yield
    elif is_deepspeed(accelerator):
        with compat.gathered_by_deepspeed(model, part or accelerator.unwrap_model(model)):
            yield
    else:
        with _gathered_by_torch(model, model if part is None else part):
            yield


def whole_state(
    accelerator: Accelerator, model: nn.Module, part: str = ""
) -> dict[str, Tensor] | None:
    """Return names and whole weights of a part of the model, such as "policy", for saving.

    All processes must call this, and only the first one gets the weights. Return None if each
    process has all weights, since the model can then save itself.
    """
    if not shards_weights(accelerator):
        return None
    prefix = f"{part}." if part else ""
    state = accelerator.get_state_dict(model) or {}
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def local_weights(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """Yield each weight detached in fp32: this process's shard, or all of it if it is whole."""
    for parameter in parameters:
        if compat.is_zero3(parameter):
            from deepspeed.utils import safe_get_local_fp32_param

            yield safe_get_local_fp32_param(parameter).detach()
        else:
            yield own_part(parameter).detach().float()


def own_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a tensor that FSDP2 splits, or the tensor. No data moves."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def as_part_of(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """Return the result of `own_part` as a tensor that is split as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


@torch.no_grad()
def set_local_weights(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    """Write back weights from `local_weights`.

    The optimizer does not see them: before its next step, write back the weights that it left."""
    for parameter, value in zip(parameters, values, strict=True):
        if compat.is_zero3(parameter):
            compat.set_zero3_weights(parameter, value)
        else:
            own_part(parameter).copy_(value)


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    if not parameter.requires_grad:
        return torch.zeros(0, device=parameter.device)
    if compat.is_zero3(parameter):
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter).detach().flatten()
    place = _place_of_gradient(parameter)
    if place is not None:
        return place.detach().float().flatten()
    if compat.is_zero2(parameter):
        return torch.zeros(0, device=parameter.device)
    weight = own_part(parameter)
    return torch.zeros_like(weight, dtype=torch.float32).flatten()


def _place_of_gradient(parameter: Any) -> Tensor | None:
    """Return the tensor that holds the gradient, or this process's shard of it, if there is one."""
    if compat.is_zero2(parameter):
        return compat.zero2_gradient(parameter)
    gradient = parameter.grad
    return None if gradient is None else own_part(gradient)


@contextmanager
def _gathered_by_torch(model: nn.Module, part: nn.Module) -> Iterator[None]:
    assert isinstance(model, FSDPModule)
    compat.make_root(model)  # otherwise the first layer that runs is the root
    # The root holds all weights outside the layers, such as embeddings and heads of every part.
    inside = [one for one in part.modules() if isinstance(one, FSDPModule) and one is not model]
    modules = [model, *inside]
    # By default the root and the head keep their weights between forward and backward pass.
    drops = [compat.drops_after_forward(module) for module in modules]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module, drops_then in zip(modules, drops, strict=True):
            module.set_reshard_after_forward(drops_then, recurse=False)
            module.reshard()
