"""Finds by a test pass how prompt trees become rows for one model.

The test must run on the run's device and inside its autocast: another device takes another path (a
mask instead of segments), and another type rounds differently.
"""

import warnings
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.inputs.block_masks import BLOCK_TOKENS
from rlhf.inputs.packing import Layout, PackedRow, Packer, PromptTree
from rlhf.models.architectures import features_of, layer_configs, num_embeddings
from rlhf.models.compat import attention_of
from rlhf.models.packed_attention import PACKED_FLEX, PACKED_SDPA
from rlhf.training.out_of_memory import is_device_error

PACKING_TOLERANCE = 1e-3
"""Largest difference that the test accepts between packed and separate passes in fp32."""
HALF_TOLERANCE = 0.25
"""The same in bfloat16. It keeps 8 bits, so rounding alone moves values of a few units by some
hundredths."""
REFUSALS = (
    ValueError,
    TypeError,
    RuntimeError,
    NotImplementedError,
    IndexError,
    AttributeError,  # a block mask is no tensor
)
"""What a model may raise that has no use for a mask."""

LAYOUTS = {
    PACKED_SDPA: (Layout.SEGMENTS, Layout.MASK),
    PACKED_FLEX: (Layout.BLOCKS,),
    "flash_attention_2": (Layout.SEQUENCES,),
}
"""Layouts to try for each attention, best first. All others try the mask."""


def packer_for(model: PreTrainedModel, micro_batch_tokens: int) -> Packer:
    """Return a packer with the first layout that passes the test for this model.

    A layout passes if its results agree with separate passes. If none does, every response gets
    its own row. That happens to models without an attention mask over positions (state space,
    ALiBi), or with a window shorter than the test's tree.

    Raises:
        ValueError: The attention is flex_attention, which nobody gets without asking for it, and
            the model cannot take its layout.
    """
    attention = attention_of(model)
    # Eager attention adds its mask to the scores, so True would count as 1.
    eager = model.dtype if attention == "eager" else None
    layouts = LAYOUTS.get(attention, (Layout.MASK,))
    if _device_of(model).type != "cpu":
        # Only a CPU uses segments.
        layouts = tuple(layout for layout in layouts if layout != Layout.SEGMENTS)
    ways = [Packer(micro_batch_tokens, layout, mask_dtype=eager) for layout in layouts]
    reason = ""
    for packer in ways:
        reason = _refusal(model, packer)
        if not reason:
            break
    else:
        if attention == PACKED_FLEX:
            raise ValueError(
                f"{type(model).__name__} does not pass the packing test with attention "
                f"flex_attention: {reason}; set attention to sdpa"
            )
        warnings.warn(
            f"{type(model).__name__} with {attention} attention cannot take the packing mask; "
            "every response goes through it alone, which is slow",
            stacklevel=2,
        )
        packer = Packer(micro_batch_tokens, Layout.ALONE)
    windows = (
        getattr(config, name, None)
        for config in layer_configs(model.config.get_text_config())
        for name in ("sliding_window", "attention_chunk_size")
    )
    return replace(packer, max_depth=min((window for window in windows if window), default=None))


@torch.no_grad()
def _refusal(model: PreTrainedModel, packer: Packer) -> str:
    """Say why a model cannot take a packer's rows, or return "" if it can.

    Packed and separate passes must agree on two trees of 26 tokens in all. A block mask gets so
    many copies of them that it has blocks to leave out. An error of the packed pass alone means
    that the model refuses the mask. Errors of memory or device, and those of the separate passes,
    are raised.
    """
    if "local" in getattr(model.config, "attention_layers", ()):
        # Its window (GPT-Neo's) is longer than these trees.
        return "its window counts places in the row"
    # Varied ids without 0, which is often the padding token.
    top = num_embeddings(model) - 1
    ids = tuple(1 + (7 * i) % top for i in range(26))
    trees = [PromptTree(ids[:6], (ids[6:12], ids[12:20])), PromptTree(ids[20:23], (ids[23:],))]
    copies = 1 + 3 * BLOCK_TOKENS // len(ids) if packer.layout == Layout.BLOCKS else 1
    device = _device_of(model)
    alone = Packer(len(ids), Layout.ALONE)
    plain = [
        copy
        for tree in trees
        for copy in [_features(model, row.to(device)) for row in alone.rows([tree])] * copies
    ]
    together = replace(packer, micro_batch_tokens=len(ids) * copies)
    rows = together.rows([tree for tree in trees for _ in range(copies)])
    try:
        packed = [_features(model, row.to(device)) for row in rows]
    except REFUSALS as error:
        if is_device_error(error):
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    difference = (torch.cat(packed) - torch.cat(plain)).abs().max().item()
    is_exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    tolerance = PACKING_TOLERANCE if is_exact else HALF_TOLERANCE
    # A NaN is no agreement either.
    return "" if difference < tolerance else f"packed passes differ by {difference:.2g}"


def _device_of(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device


def _features(model: PreTrainedModel, row: PackedRow) -> Tensor:
    """Return hidden states (tokens, model) at the positions that predict a row's tokens."""
    return features_of(model, **row.model_inputs)[0, row.predictors].float()
