"""Computes attention over packed rows only where the mask allows it.

A row's mask says for every pair of tokens whether it is allowed. sdpa computes all pairs: for a row
of n trees about n times too many. On a CPU that takes up to a quarter of a pass. There, a row names
its *segments* instead, which are its prompts and responses. Each segment attends to its prompt and
itself:

    tokens     p0 p1 p2 | a0 a1 | b0 b1 b2 || q0 q1 | c0 c1
    queries    p0 p1 p2 | a0 a1 | b0 b1 b2 || q0 q1   c0 c1
    keys       p0 p1 p2 | p a   | p b      || q0 q1   c0 c1     (an only response joins its prompt)

The segments take the place of a four-dimensional mask, which transformers passes to the layers
unchanged. PACKED_SDPA recognises them because they are integers, which no mask is. It leaves
everything else to transformers' "sdpa". rlhf.models calls `take_segments` on every model that it
loads; rlhf.models.layout tests whether it works (packer_for).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.compat import attention_of, can_rename_attention, depends_on_the_name

PACKED_SDPA = "packed_sdpa"
"""Name under which transformers knows this attention."""


def take_segments(model: PreTrainedModel) -> None:
    """Let a model with sdpa take segments as well as masks, by changing its attention.

    Without segments its results stay the same to the bit. A model stays as it is if it has another
    attention, if it fixed its attention when it was made, or if it computes something else under
    another name.
    """
    if attention_of(model) != "sdpa" or not can_rename_attention(model):
        return
    if depends_on_the_name(model):
        return
    AttentionInterface.register(PACKED_SDPA, segmented_sdpa)
    AttentionMaskInterface.register(PACKED_SDPA, sdpa_mask)
    model.set_attn_implementation(PACKED_SDPA)


def segmented_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Compute transformers' sdpa for a mask or for the segments of a packed row.

    Args:
        query: (1, heads, length, size); key and value likewise, with their own number of heads.
        attention_mask: A mask, or segments (1, 1, 4, segments) int64. Their four numbers are start
            and end of a segment, then of its prompt (an empty range if there is none). An end is
            the last place + 1. Segments follow each other and cover the row.

    Returns:
        (1, length, heads, size), and None, which transformers expects.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    segments = attention_mask[0, 0].T.tolist()
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
    return torch.cat(outputs, 1), None
