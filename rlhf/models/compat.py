"""Holds all uses of other libraries' private names in this wing.

There is no public way to do this. It was tried with transformers 5.23.0, torch 2.13.0 and
bitsandbytes 0.50.2; try a new version here first.
"""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention.flex_attention import flex_attention
from transformers import PretrainedConfig, PreTrainedModel, masking_utils

ASKS_FOR_SDPA = re.compile(r"""_attn_implementation\b.*["']sdpa["']""")
"""A line of a model's code that depends on the name "sdpa" of the attention."""


def attention_of(model: PreTrainedModel) -> str:
    """Return the name of a model's attention, such as "sdpa"."""
    name: str = model.config._attn_implementation
    return name


@contextmanager
def one_sequence_a_row() -> Iterator[None]:
    """Tell transformers that rows without a mask hold one sequence each.

    It would look at the positions. Where tensors have no data it cannot, so it would make a mask
    that no real pass needs.
    """
    find = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


MAX_FLEX_KERNELS = 64
"""Most kernels of FlexAttention in a process: by sizes of the heads, type, and with or without
gradient. torch's own limit of 8 is few for PPO's four models."""


def compiled_flex_attention(*tensors: Tensor, **settings: Any) -> Tensor:
    """Compute torch's flex_attention by its kernels, which are compiled when they are first needed.

    Uncompiled, torch holds a score for every pair of tokens. After too many kernels it would turn
    to that without a word; here it is an error.

    Raises:
        ValueError: torch cannot compile the kernel, or has compiled too many.
    """
    try:
        # A kernel holds its scale as a constant, which a dynamic number is not.
        with torch._dynamo.config.patch(recompile_limit=MAX_FLEX_KERNELS, specialize_float=True):
            output: Tensor = _compiled_flex()(*tensors, **settings)
    except (TorchDynamoException, FailOnRecompileLimitHit) as error:
        raise ValueError(
            "torch cannot compile a kernel for attention flex_attention "
            f"({' '.join(str(error).split())[:200]}); sdpa needs none"
        ) from error
    return output


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    # Dynamic, because rows differ in length. It is a full graph so that too many kernels raise.
    return torch.compile(flex_attention, fullgraph=True, dynamic=True)


def depends_on_the_name(model: PreTrainedModel) -> bool:
    """Return whether a model computes something else if the same attention has another name.

    Some add their sparse mask only if the name is "eager" or "sdpa" (DeepSeek-V3.2). Under a name
    of ours they would leave it out, and nothing would show in a short test.
    """
    modules = {type(part).__module__ for part in model.modules()}
    return any(_compares_names(module) for module in modules)


@functools.cache
def _compares_names(module: str) -> bool:
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return True  # unknown code is not trusted
    return ASKS_FOR_SDPA.search(source) is not None


def can_rename_attention(model: PreTrainedModel) -> bool:
    """Return whether a model looks its attention up by name at each pass."""
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    return all(type(part)._can_set_attn_implementation() for part in parts)


def keep_four_bits_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from packing weights in 4 bits for inference on a CPU.

    On a processor with bf16 instructions, a layer's first pass in eval mode would change the layout
    of its weight in place. From then on its kernel returns no gradient of the layer's input, so
    adapters below would no longer learn.
    """
    layers: Iterable[Any] = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def model_from_config(auto_class: Any, config: PretrainedConfig, **arguments: Any) -> Any:
    """Make a model with fresh weights from one of transformers' model classes."""
    return auto_class._from_config(config, **arguments)


def forget_adapter(model: PreTrainedModel) -> None:
    """Make transformers treat a model as one without an adapter, so that it saves all weights."""
    model._hf_peft_config_loaded = False


def stays_in_float32(model: nn.Module, name: str) -> bool:
    """Return whether a model's code asks for fp32 for a parameter, even if all others are bf16."""
    names = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    return any(one in name for one in names)


def share_storage(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are views of the same memory; also true without memory (meta)."""
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
