"""Measure a pass over one packed row under several kinds of attention.

    mask         the row's dense mask, as the stages use it
    flash        flash attention without a mask: it takes restarting positions for separate texts.
                 That is the same only for trees with one response
    flex         FlexAttention with the row's block mask

Weights are bfloat16, so that no kernel is given mixed types.
"""

from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu_check.models import load, prompts, release_memory
from benchmarks.gpu_check.records import Emit, Row, emit_filled
from benchmarks.gpu_check.setting import Setting
from benchmarks.machine import best_seconds, default_device
from rlhf.inputs.packing import Layout, PackedRow, Packer, PromptTree
from rlhf.models.heads import response_logprobs
from rlhf.models.packed_attention import PACKED_SDPA

ATTENTIONS = (
    ("mask", PACKED_SDPA, Layout.MASK),
    ("flash", "flash_attention_2", Layout.SEQUENCES),
    ("flex", PACKED_SDPA, Layout.BLOCKS),
)
"""Name in the table, name in transformers, and how the row is laid. PACKED_SDPA takes both a dense
and a block mask."""
RESPONSES = (1, 4)
"""Responses of each tree: as in PPO and SFT, and as in the reward model's rankings."""


def rows(setting: Setting, emit: Emit) -> None:
    """Report milliseconds and memory of a pass, and how far its results are from the mask's."""
    policy = load(setting, "bf16 weights")
    for length in setting.sizes.row_tokens:
        for num_responses in RESPONSES:
            trees = make_trees(setting, length, num_responses)
            expected = logprobs_of(policy, lay(trees, length, Layout.MASK))
            for name, attention, layout in ATTENTIONS:
                if layout == Layout.SEQUENCES and num_responses > 1:
                    continue  # each response would have its own copy of the prompt
                fill = partial(
                    measure, setting, policy, attention, lay(trees, length, layout), expected
                )
                start: Row = {"tokens": length, "responses": num_responses, "attention": name}
                emit_filled(emit, start, fill, Exception)
                policy.set_attn_implementation(PACKED_SDPA)
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


def make_trees(setting: Setting, length: int, num_responses: int) -> list[PromptTree]:
    """Make trees that fill a row of this length; half of each is its prompt."""
    size = setting.sizes.tree_tokens
    half, each = size // 2, size // 2 // num_responses
    texts = (tuple(ids) for ids in prompts(setting, [size] * (length // size)))
    return [
        PromptTree(ids[:half], tuple(ids[i : i + each] for i in range(half, size, each)))
        for ids in texts
    ]


def lay(trees: list[PromptTree], length: int, layout: Layout) -> PackedRow:
    """Lay trees into one row on the device."""
    (row,) = Packer(length, layout).rows(trees)
    return row.to(default_device())


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
