"""One training step and one look at the weights, whatever is split between the processes.

    launcher    weights      gradients    optimizer states
    DDP         whole        whole        whole
    ZeRO-2      whole        in shards    in shards
    ZeRO-3      in shards    in shards    in shards
    FSDP2       in shards    in shards    in shards

A *shard* is the part that this process holds. A loop that uses these functions reads the same under
each launcher: `one_pass` and `backward` for every pass of a step, `clip_gradients` and `take_step`
at its end, `whole_weights` around whatever runs the model without a gradient.

DeepSpeed itself would clip both models of PPO by one norm and keep to itself what the gradients
are, so its clip is off and its shards are read and written here. It is imported in functions that
run under it only.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from rlhf.training.processes import sum_over_processes


def is_deepspeed(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.DEEPSPEED


def shards_gradients(accelerator: Accelerator) -> bool:
    """Whether each process has a part of the gradients only."""
    return accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def shards_weights(accelerator: Accelerator) -> bool:
    """Whether each process has a part of the weights only."""
    if is_deepspeed(accelerator):
        return accelerator.state.deepspeed_plugin.zero_stage == 3
    return accelerator.distributed_type == DistributedType.FSDP


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as the launcher wants it wrapped, and the optimizer of what it holds."""
    if is_deepspeed(accelerator):
        settings = accelerator.state.deepspeed_plugin.deepspeed_config
        settings["train_micro_batch_size_per_gpu"] = 1  # it wants a number, and reads it nowhere
        settings["gradient_clipping"] = 0.0
    return accelerator.prepare(model, optimizer)


def autocast_unwrapped(accelerator: Accelerator) -> AbstractContextManager[object]:
    """The launcher's mixed precision for a model that the launcher did not wrap.

    DeepSpeed casts the weights that it wraps and nothing else, so accelerate's own autocast does
    nothing under it, and a frozen model in float32 would be several times slower than the policy.
    """
    if is_deepspeed(accelerator) and accelerator.mixed_precision == "bf16":
        return torch.autocast(accelerator.device.type, torch.bfloat16)
    return accelerator.autocast()


@contextmanager
def one_pass(accelerator: Accelerator, model: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Around the forward and the backward pass of one row; `is_last` of those that are summed.

    Gradients travel in the last pass only where they are whole, in every pass where they are in
    shards. In both cases all processes must make as many passes.
    """
    if is_deepspeed(accelerator):
        model.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
        yield
    elif is_last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


def backward(accelerator: Accelerator, model: nn.Module, loss: Tensor) -> None:
    """Adds the gradient of the loss; the processes' gradients are averaged, not summed."""
    if is_deepspeed(accelerator):  # accelerate's own would take the step too
        model.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]
    else:
        accelerator.backward(loss)


def clip_gradients(
    accelerator: Accelerator, parameters: Iterable[nn.Parameter], max_norm: float
) -> float:
    """Scales gradients down to a norm of at most `max_norm`, over all of them; their norm before.

    Between the last pass and the step.
    """
    parameters = list(parameters)
    if not shards_gradients(accelerator):
        return float(accelerator.clip_grad_norm_(parameters, max_norm))
    before = norm(accelerator, local_gradients(parameters))
    if before > max_norm:
        scale_gradients(parameters, max_norm / (before + 1e-6))  # as torch's clip_grad_norm_ does
    return before


def take_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    frozen: Mapping[int, nn.Module] | None = None,
) -> None:
    """One step of the optimizer. DeepSpeed forgets the gradients, else they are still there.

    Args:
        frozen: modules that stay as they are, by their number in `make_optimizer`: a gradient of 0
            would still move them by weight decay and age Adam's moments.
    """
    frozen = frozen or {}
    parameters = [parameter for module in frozen.values() for parameter in module.parameters()]
    if not is_deepspeed(accelerator):
        for parameter in parameters:
            parameter.grad = None
        optimizer.step()
        return
    scale_gradients(parameters, 0.0)
    for group in optimizer.param_groups:
        if group["module"] in frozen:
            group["lr"] = 0.0  # until the schedule's next step
    model.step()  # type: ignore[operator]
    if frozen:
        _forget_empty_steps(model)


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This process's shard of each gradient, or the whole where it has that; flat, in fp32.

    Zeros where there is none. Under DeepSpeed after a last pass and before the step only.
    """
    return [_local_gradient(parameter) for parameter in parameters]


def set_local_gradients(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    """The inverse of `local_gradients`; what has no gradient gets none."""
    for parameter, value in zip(parameters, values, strict=True):
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_set_local_grad

            safe_set_local_grad(parameter, value)
        elif (place := _place_of_gradient(parameter)) is not None:
            place.copy_(value.view_as(place))


def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies gradients, or this process's shards of them; 0 makes zeros of NaN too."""
    parameters = list(parameters)
    scaled = [
        torch.zeros_like(gradient) if factor == 0 else gradient * factor
        for gradient in local_gradients(parameters)
    ]
    set_local_gradients(parameters, scaled)


def zero_gradients(
    accelerator: Accelerator, model: nn.Module, parameters: Iterable[nn.Parameter]
) -> None:
    """Has the passes that follow add to nothing, between two passes of one step.

    Args:
        parameters: all that are trained.
    """
    scale_gradients(parameters, 0.0)
    if is_deepspeed(accelerator):
        for buffer in _accumulated_gradients(model):
            buffer.zero_()


def norm(accelerator: Accelerator, gradients: Sequence[Tensor]) -> float:
    """Of what `local_gradients` gave on all processes, in full."""
    return math.sqrt(dot(accelerator, gradients, gradients))


def dot(accelerator: Accelerator, some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Inner product of two gradients that `local_gradients` gave, in full."""
    parts = [(a * b).sum(dtype=torch.float64) for a, b in zip(some, others, strict=True)]
    own = float(torch.stack(parts).sum()) if parts else 0.0
    return float(sum_over_processes(accelerator, own)) if shards_gradients(accelerator) else own


@contextmanager
def whole_weights(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Has every process hold all weights, gathered once, until the end.

    Inside, no module of the model gathers or drops weights, so processes may run it as often as
    they like and without each other. Nothing is to be done where weights are whole anyway.
    """
    if not shards_weights(accelerator):
        yield
    elif is_deepspeed(accelerator):
        with _gathered_by_deepspeed(model):
            yield
    else:
        with _gathered_by_torch(model):
            yield


def whole_state(
    accelerator: Accelerator, model: nn.Module, part: str = ""
) -> dict[str, Tensor] | None:
    """Names and whole weights of a part of the model, such as "policy", to be saved by the first
    process; None where each process has them all and the model saves itself.

    All processes take part, and only the first one gets anything.
    """
    if not shards_weights(accelerator):
        return None
    prefix = f"{part}." if part else ""
    state = accelerator.get_state_dict(model) or {}
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def local_weights(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    """This process's shard of each weight, or the whole where it has that; detached, in fp32."""
    for parameter in parameters:
        if hasattr(parameter, "ds_id"):
            from deepspeed.utils import safe_get_local_fp32_param

            yield safe_get_local_fp32_param(parameter).detach()
        else:
            weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            yield weight.detach().float()


@torch.no_grad()
def set_local_weights(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    """The inverse of `local_weights`, for the end of a run: optimizer states know nothing of it."""
    for parameter, value in zip(parameters, values, strict=True):
        if hasattr(parameter, "ds_id"):
            _set_deepspeed_shard(parameter, value)
        else:
            weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            weight.copy_(value)


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    if not parameter.requires_grad:
        return torch.zeros(0, device=parameter.device)
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(parameter).detach().flatten()
    place = _place_of_gradient(parameter)
    if place is not None:
        return place.detach().float().flatten()
    if hasattr(parameter, "_hp_mapping"):
        return torch.zeros(0, device=parameter.device)
    weight = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return torch.zeros_like(weight, dtype=torch.float32).flatten()


def _place_of_gradient(parameter: Any) -> Tensor | None:
    """The tensor that holds the gradient, or this process's shard of it, where there is one."""
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2; None: the parameter is another process's
        if parameter._hp_mapping is None:
            return None
        return parameter._hp_mapping.get_lp_grad_fragment(parameter._index_in_param_group)
    gradient = parameter.grad
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _forget_empty_steps(engine: Any) -> None:
    """Sets Adam's count of steps back where its moments saw zeros only, as if there were none."""
    for state in engine.optimizer.optimizer.state.values():
        if "exp_avg_sq" in state and not state["exp_avg_sq"].any():
            step = state["step"]  # a tensor of torch's AdamW, a number of DeepSpeed's CPU Adam
            state["step"] = torch.zeros_like(step) if isinstance(step, Tensor) else 0


def _accumulated_gradients(engine: Any) -> list[Tensor]:
    """What DeepSpeed adds the gradients of the next pass to.

    With offload_optimizer the gradients that `local_gradients` reads are copies of it, made at the
    last pass, and zeros in these copies do not last.
    """
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        return [optimizer.grad_partitions_flat_buffer]
    if not optimizer.cpu_offload:
        return []
    compact = [group.flat_partition for group in optimizer.averaged_gradients.values()]
    return [*optimizer.accumulated_grads_in_cpu.values(), *compact]


@contextmanager
def _gathered_by_deepspeed(engine: Any) -> Iterator[None]:
    """DeepSpeed's hooks would drop each module's weights behind its first use."""
    from deepspeed.runtime.zero import GatheredParameters

    offload = engine.optimizer.parameter_offload
    with GatheredParameters(list(engine.module.parameters())):
        for parameter in engine.module.parameters():
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
def _gathered_by_torch(model: nn.Module) -> Iterator[None]:
    assert isinstance(model, FSDPModule)
    # The root is whichever module runs first, and inside it would be a layer.
    model._get_fsdp_state()._lazy_init()
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def _set_deepspeed_shard(parameter: Any, value: Tensor) -> None:
    from deepspeed.runtime.zero import GatheredParameters

    count = torch.distributed.get_world_size()
    whole = value.new_empty(count * value.numel())
    torch.distributed.all_gather_into_tensor(whole, value.contiguous())
    with GatheredParameters([parameter], modifier_rank=0):
        parameter.data.copy_(whole[: parameter.ds_numel].view(parameter.ds_shape))
