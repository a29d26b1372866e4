"""Explains an out-of-memory error: the phase of the run, and the setting to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_FIRST_TOKENS = "micro_batch_tokens, then set gradient_checkpointing"
REMEDIES = {
    "load": "the model's size, or hold frozen models with dtype bfloat16; in PPO offload keeps the "
    "reference and the reward model in CPU memory",
    "rollout": "generation.batch_size, or rollout.max_new_tokens",
    "score": "micro_batch_tokens, or set offload",
    "logprobs": "micro_batch_tokens",
    "reference": "micro_batch_tokens, or set offload",
    "value": "micro_batch_tokens",
    "ptx": _FIRST_TOKENS,
    "train": _FIRST_TOKENS,
    "step": "ptx.gradient_norms (false), ema_decay (null), or the model's size; several processes "
    "with DeepSpeed split the optimizer (configs/accelerate)",
    "evaluate": "generation.batch_size, or micro_batch_tokens",
    "sft training": "micro_batch_size, or the limits of tokens, then set gradient_checkpointing",
}
"""Maps a phase to the settings that bound its memory."""

_CPU_MESSAGES = ("can't allocate memory", "not enough memory", "Cannot allocate memory")


class OutOfMemoryError(ValueError):
    """Says that memory ran out: in which phase, and which setting to lower."""


def is_device_error(error: BaseException) -> bool:
    """Return whether torch ran out of memory, or met a device fault or tensors on two devices."""
    if is_out_of_memory(error) or isinstance(error, torch.AcceleratorError):
        return True
    return isinstance(error, RuntimeError) and "device" in str(error).lower()


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether torch (on any device) or Python ran out of memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    is_torch = isinstance(error, RuntimeError)
    return is_torch and any(message in str(error) for message in _CPU_MESSAGES)


def explain(error: BaseException, phase: str | None = None) -> str:
    """Return one line: where memory ran out, what was asked for, and what to lower."""
    asked = " ".join(str(error).split())[:200] or type(error).__name__
    where = "" if phase is None else f" in phase {phase}"
    remedy = REMEDIES.get(phase or "", "micro_batch_tokens or generation.batch_size")
    return (
        f"out of memory{where} ({asked}); lower {remedy}. `python -m tools.plan` with the same "
        "settings shows what every phase needs"
    )


@contextmanager
def memory_of(phase: str) -> Iterator[None]:
    """Name the phase in an out-of-memory error that is raised in the block.

    Raises:
        OutOfMemoryError: Replaces the error of torch or Python.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(explain(error, phase)) from None
