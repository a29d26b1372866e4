"""Computes attention over packed rows only where the mask allows it.

A row's mask says for every pair of tokens whether it is allowed. sdpa computes all pairs: for a row
of n trees about n times too many. On a CPU that takes up to a quarter of a pass. There, a row names
its *segments* instead, which are its prompts and responses. Each segment attends to its prompt and
itself:

    tokens     p0 p1 p2 | a0 a1 | b0 b1 b2 || q0 q1 | c0 c1
    queries    p0 p1 p2 | a0 a1 | b0 b1 b2 || q0 q1   c0 c1
    keys       p0 p1 p2 | p a   | p b      || q0 q1   c0 c1     (an only response joins its prompt)

Elsewhere a row may bring a block mask for FlexAttention instead (rlhf.inputs.block_masks). Its
kernels are compiled when they are first used. Those for a CPU have no gradient, so there the blocks
are computed one row of blocks at a time, with the same results.

Both take the place of a four-dimensional mask, which transformers passes to the layers unchanged,
and are recognised by their types. Everything else is left to transformers' "sdpa". rlhf.models
calls `take_packed_rows` on every model that it loads; rlhf.models.layout tests whether it works
(packer_for).
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.inputs.packing import ModelInput
from rlhf.models.compat import (
    attention_of,
    can_rename_attention,
    compiled_flex_attention,
    depends_on_the_name,
)
from rlhf.models.settings import Attention

PACKED_SDPA = "packed_sdpa"
"""Name under which transformers knows this attention, where rows have segments or masks."""
PACKED_FLEX = "packed_flex"
"""Name of the same attention where rows have block masks."""
NOT_IN_FLEX = ("softcap", "s_aux", "position_bias")
"""What some architectures give their attention, and no block mask can express."""


def take_packed_rows(model: PreTrainedModel, attention: Attention) -> None:
    """Let a model with sdpa take segments and block masks as well, by changing its attention.

    Without them its results stay the same to the bit. A model stays as it is if it has another
    attention, if it fixed its attention when it was made, or if it computes something else under
    another name.

    Args:
        attention: The attention that was asked for. With flex_attention rows get block masks.

    Raises:
        ValueError: It is flex_attention, and the model must stay as it is.
    """
    is_flex = attention == "flex_attention"
    is_free = attention_of(model) == "sdpa" and can_rename_attention(model)
    if not is_free or depends_on_the_name(model):
        if is_flex:
            raise ValueError(
                f"attention is flex_attention, and {type(model).__name__} has an attention of its "
                "own that takes no block mask; set attention to sdpa"
            )
        return
    name = PACKED_FLEX if is_flex else PACKED_SDPA
    AttentionInterface.register(name, packed_attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: ModelInput,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute attention as transformers' sdpa does, here also over segments or a block mask.

    Args:
        query: (1, heads, length, size); key and value likewise, with their own number of heads.
        attention_mask: A mask, segments (1, 1, 4, segments) int64, or a block mask.
        settings: What transformers' attentions take beside these, such as `scaling`.

    Returns:
        (1, length, heads, size), and None, which transformers expects.
    """
    if isinstance(attention_mask, BlockMask):
        return _flex(module, query, key, value, attention_mask, settings), None
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    return _segmented(module, query, key, value, attention_mask, settings), None


def _flex(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    settings: dict[str, Any],
) -> Tensor:
    """Compute attention under a block mask (1, length, heads, size)."""
    given = [name for name in NOT_IN_FLEX if settings.get(name) is not None]
    if given:
        raise ValueError(f"a block mask has no place for {', '.join(given)}")
    if query.device.type == "cpu":
        return _by_rows_of_blocks(module, query, key, value, mask, settings)
    return _by_kernel(query, key, value, mask, settings)


def _by_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, settings: dict[str, Any]
) -> Tensor:
    output = compiled_flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=settings.get("scaling"),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).contiguous()


def _by_rows_of_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    settings: dict[str, Any],
) -> Tensor:
    """Compute each block of queries over those blocks of keys that the mask lists for it."""
    assert mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None
    lists = (
        (mask.kv_num_blocks, mask.kv_indices),
        (mask.full_kv_num_blocks, mask.full_kv_indices),
    )
    places = torch.arange(query.shape[2]).split(mask.BLOCK_SIZE[0])
    outputs = []
    for row, queries in enumerate(places):
        listed = [indices[0, 0, row, : numbers[0, 0, row]] for numbers, indices in lists]
        keys = torch.cat([places[block] for block in torch.cat(listed).tolist()])
        # The rule for batch 0 and head 0 is the rule for all.
        zero = keys.new_zeros(())
        allowed = mask.mask_mod(zero, zero, queries[:, None], keys)
        output, _ = sdpa_attention_forward(
            module,
            query[:, :, queries],
            key[:, :, keys],
            value[:, :, keys],
            allowed[None, None],
            **settings,
        )
        outputs.append(output)
    return torch.cat(outputs, 1)


def _segmented(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    settings: dict[str, Any],
) -> Tensor:
    """Compute each segment over its prompt and itself.

    The four numbers of a segment are its start and end, then those of its prompt (an empty range if
    there is none). An end is the last place + 1. Segments follow each other and cover the row.
    """
    # Read at once: the plan's dry run takes segments with data, and computes the rest without.
    segments = list(zip(*attention_mask.tolist()[0][0], strict=True))
    places = {start: place for place, (start, *_) in enumerate(segments)}
    sizes = [end - start for start, end, *_ in segments]
    # Split, not sliced: each slice's gradient would be as long as the whole row.
    queries, keys, values = (tensor.split(sizes, 2) for tensor in (query, key, value))
    outputs = []
    for place, (_, _, prompt_start, prompt_end) in enumerate(segments):
        mask = None  # causal
        some_keys, some_values = keys[place], values[place]
        if prompt_end > prompt_start:
            prompt = places[prompt_start]
            some_keys = torch.cat([keys[prompt], some_keys], 2)
            some_values = torch.cat([values[prompt], some_values], 2)
            shape = sizes[place], some_keys.shape[2]
            mask = torch.ones(shape, dtype=torch.bool).tril(prompt_end - prompt_start)[None, None]
        output, _ = sdpa_attention_forward(
            module, queries[place], some_keys, some_values, mask, **settings
        )
        outputs.append(output)
    return torch.cat(outputs, 1)
