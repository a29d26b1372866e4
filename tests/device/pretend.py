"""Pretends that a machine without an accelerator has one.

    register()                 # once a process; it cannot be undone
    with at_work() as waits:
        train(config)          # torch.device("pretend") is what "cuda" is elsewhere
    waits.within("stages/rm/update.py:update")

A tensor on this device reports it as its place. Its data are in CPU memory, and the CPU does every
operation, so results are those of a CPU. The device refuses what CUDA refuses:

- operands on two devices; only a number (a tensor without axes) and indices may be on the CPU;
- a generator of another device than the tensor that is drawn;
- numpy().

It records what makes the host wait for the device, with the lines of rlhf and stages that led to
it. These are synchronize, and what torch.cuda.set_sync_debug_mode reports:

- a value that Python reads (item, tolist, bool);
- a result whose size depends on values (nonzero, a mask as an index);
- every copy to the CPU, and every copy to the device without non_blocking.

It knows nothing of kernels, streams, memory or time. Autocast can be on, but casts nothing.
"""

import functools
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, library
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pretend"
ROOT = Path(__file__).parents[2]
OWN = tuple(str(ROOT / folder) + os.sep for folder in ("rlhf", "stages"))
aten = torch.ops.aten

IS_SUPPORTED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")
"""Whether this torch can register a device from Python; the call is experimental (2.13 has it)."""


class DeviceMismatch(RuntimeError):
    """Stands for CUDA's refusal of operands on two devices."""


@dataclass(frozen=True)
class Wait:
    """Records that the host waited for the device once."""

    operation: str
    path: tuple[str, ...]
    """Our own lines that led to it as "folder/file.py:function:line", the innermost last. Empty in
    a backward pass, which torch runs in a thread of its own."""

    def is_within(self, place: str) -> bool:
        """Return whether a function of ours led to it, as in Waits.within."""
        return any(line.startswith(place) for line in self.path)


@dataclass
class Waits:
    """Holds every time the host waited, in order."""

    found: list[Wait] = field(default_factory=list)

    def note(self, operation: str) -> None:
        self.found.append(Wait(operation, _own_lines()))

    def within(self, place: str) -> list[Wait]:
        """Return the waits that a function of ours, "folder/file.py:function", led to."""
        return [one for one in self.found if one.is_within(place)]


def lines(waits: Sequence[Wait]) -> str:
    """Say for a failed test which line of ours waited how often, and why."""
    seen: dict[tuple[str, str], int] = {}
    for one in waits:
        key = (one.path[-1] if one.path else "a backward pass", one.operation)
        seen[key] = seen.get(key, 0) + 1
    rows = sorted(seen.items(), key=lambda item: -item[1])
    return "\n".join(f"{count:5} {place} {operation}" for (place, operation), count in rows)


class _Module:
    """Has the functions that torch.cuda has for CUDA."""

    __name__ = "torch.pretend"

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        pass

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def get_rng_state(self, *_: Any) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, *_: Any) -> None:
        pass


_kept: list[library.Library] = []
"""Objects registered with torch, which would forget them if they were deleted."""


def register() -> None:
    """Make the device this process's accelerator, for good."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    every_operation = library.Library("_", "IMPL")
    every_operation.fallback(library.fallthrough_kernel, "AutocastPrivateUse1")
    _kept.append(every_operation)


class DeviceTensor(Tensor):
    """A tensor on the device; `host` holds its data."""

    host: Tensor
    # torch does the same in its own code; its stubs forbid it to subclasses.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor) -> "DeviceTensor":
        return Tensor._make_wrapper_subclass(
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, host: Tensor) -> None:
        self.host = host

    # torch passes the text of the contents to its own one; other classes format them.
    def __repr__(self) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host})"

    # With these two, Module.to keeps parameters the same objects, as it does with CUDA.
    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["host"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> "DeviceTensor":
        return DeviceTensor(inner["host"])

    # Tensor itself has a disabled one, whose type in the stubs lacks `func`.
    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Outside of at_work no waits are recorded, but tensors on the device may still be read.
        return _run(Waits(), func, args, kwargs or {})


class DeviceGenerator(torch.Generator):
    """Draws on the CPU, and counts as a generator of the device."""


def make_generator(device: torch.device | str = "cpu") -> torch.Generator:
    """Replaces torch.Generator, which refuses a device registered from Python."""
    return DeviceGenerator() if torch.device(device).type == NAME else _Generator()


_Generator = torch.Generator


class _Operations(TorchDispatchMode):
    """Runs every operation, also those that make a tensor."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(self.waits, func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Sees what never becomes an operation: generators, and data that Python reads."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _check_generator(func, args, kwargs)
        if not (args and isinstance(args[0], DeviceTensor)):
            return func(*args, **kwargs)
        if func is Tensor.tolist:
            self.waits.note("tolist")
            return args[0].host.tolist()
        if func is Tensor.numpy:
            raise TypeError(f"can't convert a tensor on {NAME} to numpy; call cpu() first")
        if func in (Tensor.untyped_storage, Tensor.data_ptr):
            return func(args[0].host, *args[1:], **kwargs)
        return func(*args, **kwargs)


def _check_generator(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    generator = kwargs.get("generator")
    if generator is None:
        return
    device = kwargs.get("device")
    draws_there = _is_there(device) or any(isinstance(x, DeviceTensor) for x in tree_leaves(args))
    if draws_there != isinstance(generator, DeviceGenerator):
        raise DeviceMismatch(f"{func}: expected a generator of the device on which it draws")


@contextmanager
def at_work() -> Iterator[Waits]:
    """Make torch use the device inside the block; yield what the host waits for."""
    waits = Waits()
    lifted = torch._C._only_lift_cpu_tensors()
    # torch.tensor(values, device=...) then makes a CPU tensor and copies it, which is recorded.
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with (
            mock.patch.object(torch, "Generator", make_generator),
            mock.patch.object(
                torch.accelerator, "synchronize", lambda *_: waits.note("synchronize")
            ),
            mock.patch.object(torch.accelerator, "empty_cache", lambda: None),
            mock.patch.dict(os.environ, {"ACCELERATE_TORCH_DEVICE": NAME}),
            _Calls(waits),
            _Operations(waits),
        ):
            yield waits
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)


COPIES = {aten._to_copy.default, aten.copy_.default}
"""Operations whose operands may be on two devices."""

TAKES_INDICES = {
    aten.index.Tensor,
    aten._unsafe_index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index_put.default,
}
"""Operations whose second operand is a list of indices."""

READS_VALUES = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.masked_scatter_backward,
    aten.masked_select,
    aten.nonzero,
    aten.repeat_interleave,
    aten.unique_consecutive,
    aten.unique_dim,
}
"""Operations whose result in Python, or whose size, depends on values on the device."""


def _run(waits: Waits, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation with the data on the CPU, by the rules of a device."""
    operands = list(_tensors((*args, *kwargs.values())))
    is_there = any(isinstance(x, DeviceTensor) for x in operands)
    target = kwargs.get("device")
    if is_there:
        _check_devices(func, args, operands)
    if is_there or target is not None:
        why = _reason_to_wait(func, args, kwargs)
        if why is not None:
            waits.note(why)
    if func is aten.is_pinned.default:
        return False
    if func is aten._fused_sdp_choice.default and is_there:
        return 0  # that is plain products and a softmax, each of which is checked
    host_args = [_host(x) for x in args]
    host_kwargs = {name: _host(x) for name, x in kwargs.items()}
    if _is_there(target):
        host_kwargs["device"] = torch.device("cpu")
    with torch._C._DisableTorchDispatch():
        out = func(*host_args, **host_kwargs)
    if func is aten.copy_.default:
        return args[0]
    goes_there = is_there if target is None else _is_there(target)
    if not goes_there:
        return out
    wrapped = tree_map(lambda x: DeviceTensor(x) if isinstance(x, Tensor) else x, out)
    if is_there and _has_alias(func):
        return return_and_correct_aliasing(func, args, kwargs, wrapped)
    return wrapped


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _host(value: Any) -> Any:
    """Return a value with the data of every tensor in it."""
    if isinstance(value, DeviceTensor):
        return value.host
    return [_host(x) for x in value] if isinstance(value, list | tuple) else value


@functools.cache
def _has_alias(func: Any) -> bool:
    """Return whether a result is a view of an operand, or the operand itself."""
    return any(result.alias_info is not None for result in func._schema.returns)


def _check_devices(func: Any, args: Any, operands: Sequence[Tensor]) -> None:
    """Refuse operands on two devices, as CUDA does."""
    if func in COPIES:
        return
    indices = [x for x in args[1] if x is not None] if func in TAKES_INDICES else []
    others = [
        x
        for x in operands
        if not isinstance(x, DeviceTensor) and x.dim() > 0 and not any(x is i for i in indices)
    ]
    if others or (indices and not isinstance(args[0], DeviceTensor)):
        raise DeviceMismatch(
            f"{func}: expected all tensors to be on the same device, but found at least two "
            f"devices, {NAME}:0 and cpu (shapes {[tuple(x.shape) for x in operands]})"
        )


def _reason_to_wait(func: Any, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Return why the host waits for the device in this operation; None if it goes on."""
    if func.overloadpacket in READS_VALUES:
        return str(func.overloadpacket).removeprefix("aten.")
    if func in TAKES_INDICES:
        indices = [x for x in args[1] if x is not None]
        if any(not isinstance(x, DeviceTensor) for x in indices):
            return "indices on the CPU"
        if any(x.dtype == torch.bool for x in indices) and not _fills(args, indices):
            return "a mask as an index"
        return None
    if func is aten._to_copy.default:
        before = isinstance(args[0], DeviceTensor)
        goal = kwargs.get("device")
        after = before if goal is None else _is_there(goal)
        goes_on = kwargs.get("non_blocking", False)
    elif func is aten.copy_.default:
        before, after = (isinstance(x, DeviceTensor) for x in (args[1], args[0]))
        goes_on = kwargs.get("non_blocking", args[2:] == (True,))
    else:
        return None
    if before and not after:
        return "a copy to the CPU"
    return "a copy to the device" if after and not before and not goes_on else None


def _fills(args: Any, indices: Sequence[Tensor]) -> bool:
    """Return whether one number is assigned under masks, which CUDA does without their places."""
    return len(args) > 2 and args[2].numel() == 1 and all(x.dtype == torch.bool for x in indices)


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _own_lines() -> tuple[str, ...]:
    """Return the lines of rlhf and stages that Python is in, the innermost last."""
    found: list[str] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(OWN):
            place = f"{os.path.relpath(file, ROOT)}:{frame.f_code.co_name}:{frame.f_lineno}"
            found.append(place)
        frame = frame.f_back
    return tuple(reversed(found))
