"""Attention over packed rows that computes only what the mask allows.

A mask of a row says for every pair of tokens whether it is allowed, and sdpa computes all pairs: of
a row of n trees about n times too many. On a CPU, where that is up to a quarter of a pass, a row
names its *segments* instead, the prompts and the responses in it, and each is a small attention of
its own over its prompt and itself:

    tokens     p0 p1 p2 | a0 a1 | b0 b1 b2 || q0 q1 | c0 c1
    queries    p0 p1 p2 | a0 a1 | b0 b1 b2 || q0 q1   c0 c1
    keys       p0 p1 p2 | p a   | p b      || q0 q1   c0 c1     (a lone response is one with it)

The segments travel where transformers takes a four-dimensional mask, which it hands to the layers
as it is. They are integers, as no mask is, and by that our "sdpa" knows them; anything else goes to
transformers' own. rlhf.models.layout registers it, and a probe there decides for each model
whether it works (packer_for).
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward


def segmented_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa, which also takes the segments of a packed row.

    Args:
        query: (1, heads, length, size); key and value likewise, with their own number of heads.
        attention_mask: a mask, or segments (1, 1, 4, segments) int64: first and last place + 1 of
            each segment, then of the prompt before it (an empty range where there is none). They
            follow each other and cover the row.

    Returns:
        (1, length, heads, size), and None as transformers expects.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    segments = attention_mask[0, 0].T.tolist()
    places = {start: place for place, (start, *_) in enumerate(segments)}
    sizes = [end - start for start, end, *_ in segments]
    # Split, not sliced: the gradient of a slice is as long as the row, for each segment anew.
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
