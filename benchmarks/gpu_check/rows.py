"""Measure a pass over one packed row under several kinds of attention.

    mask         the row's dense mask, as the stages use it
    flash        flash attention without a mask: it takes restarting positions for separate texts.
                 That is the same only for trees with one response, which these rows have
    flex         FlexAttention with a block mask of the same rule as the dense one

Weights are bfloat16, so that no kernel is given mixed types.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import PreTrainedModel

from benchmarks.gpu_check.models import load, prompts, release_memory
from benchmarks.gpu_check.records import Row, Tell, tell_filled
from benchmarks.gpu_check.setting import Setting
from benchmarks.machine import best_seconds, default_device
from rlhf.inputs.packing import Layout, PackedRow, Packer, PromptTree
from rlhf.models.heads import response_logprobs


@dataclass(frozen=True)
class OtherRow(PackedRow):
    """A packed row whose attention mask is given: a block mask, or None for positions only."""

    given: Any = None

    @cached_property
    def attention_mask(self) -> Any:
        return self.given


def rows(setting: Setting, tell: Tell) -> None:
    """Report milliseconds and memory of a pass, and how far its results are from the mask's."""
    policy = load(setting, "bf16 weights")
    for length in setting.sizes.row_tokens:
        packed = full_row(setting, length)
        policy.set_attn_implementation("sdpa")
        expected = logprobs_of(policy, packed)
        for name, attention, change in ATTENTIONS:
            policy.set_attn_implementation("sdpa")  # stays in use if the next call refuses
            fill = partial(measure, setting, policy, attention, change(packed), expected)
            with eager_if(setting.is_smoke):
                tell_filled(tell, {"tokens": length, "attention": name}, fill, Exception)
            policy.zero_grad()
            release_memory()


def measure(
    setting: Setting,
    policy: PreTrainedModel,
    attention: str,
    packed: PackedRow,
    expected: Tensor,
    row: Row,
) -> None:
    """Add to a row the time, the memory and the difference from `expected` (tokens,)."""
    policy.set_attn_implementation(attention)
    row["off by, nats"] = (logprobs_of(policy, packed) - expected).abs().max().item()
    time_passes(policy, packed, row, setting.sizes.timed_seconds)


@torch.no_grad()
def logprobs_of(policy: PreTrainedModel, row: PackedRow) -> Tensor:
    return response_logprobs(policy, row)


def full_row(setting: Setting, length: int) -> PackedRow:
    """Lay trees of one response each into one row of this length, on the device."""
    size = setting.sizes.tree_tokens
    texts = prompts(setting, [size] * (length // size))
    trees = [PromptTree(tuple(ids[: size // 2]), (tuple(ids[size // 2 :]),)) for ids in texts]
    (row,) = Packer(length).rows(trees)
    return row.to(default_device())


def with_positions_only(row: PackedRow) -> PackedRow:
    return replace(row, layout=Layout.SEQUENCES)


def with_block_mask(row: PackedRow) -> PackedRow:
    return other_row(row, block_mask(row))


def other_row(row: PackedRow, mask: Any) -> OtherRow:
    return OtherRow(**{one.name: getattr(row, one.name) for one in fields(row)}, given=mask)


def block_mask(row: PackedRow) -> BlockMask:
    """Return the rule of `PackedRow.attention_mask` as FlexAttention takes it."""
    tree, branch = row.tree, row.branch

    def allows(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_near = (branch[key] == 0) | (branch[key] == branch[query])
        return (tree[query] == tree[key]) & is_near & (query >= key)

    length = len(tree)
    return create_block_mask(allows, None, None, length, length, device=str(row.device))


Change = Callable[[PackedRow], PackedRow]
ATTENTIONS: tuple[tuple[str, str, Change], ...] = (
    ("mask", "sdpa", lambda row: row),
    ("flash", "flash_attention_2", with_positions_only),
    ("flex", "flex_attention", with_block_mask),
)
"""Name in the table, name in transformers, and how the row is changed."""


def time_passes(policy: PreTrainedModel, row: PackedRow, found: Row, seconds: float) -> None:
    """Add to `found` the milliseconds of a pass without and with its gradient, and its memory."""

    def both() -> None:
        policy.zero_grad()
        response_logprobs(policy, row).sum().backward()

    found["forward, ms"] = 1000 * best_seconds(lambda: logprobs_of(policy, row), seconds)
    if row.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found["with backward, ms"] = 1000 * best_seconds(both, seconds)
    if row.device.type == "cuda":  # weights and their gradients are in it, for each attention alike
        found["peak memory, GB"] = torch.cuda.max_memory_allocated() / 1e9


def eager_if(is_smoke: bool) -> Any:
    """Leave torch.compile out of a smoke test: it needs a compiler and minutes."""
    return torch.compiler.set_stance("force_eager") if is_smoke else nullcontext()
