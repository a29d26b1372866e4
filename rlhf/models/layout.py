"""Finds by a test pass how prompt trees become rows for one model.

The test must run on the run's device and inside its autocast: another device takes another path (a
mask instead of segments), and another type rounds differently.
"""

import warnings
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.inputs.packing import Layout, PackedRow, Packer, PromptTree
from rlhf.models.architectures import features_of, layer_configs, num_embeddings
from rlhf.models.compat import attention_of
from rlhf.models.packed_attention import PACKED_SDPA
from rlhf.training.out_of_memory import is_of_the_device

PACKING_TOLERANCE = 1e-3
"""Largest difference that the test accepts between packed and separate passes in fp32."""
HALF_TOLERANCE = 0.25
"""The same in bfloat16. It keeps 8 bits, so rounding alone moves values of a few units by some
hundredths."""

LAYOUTS = {
    PACKED_SDPA: (Layout.SEGMENTS, Layout.MASK),
    "flash_attention_2": (Layout.SEQUENCES,),
}
"""Layouts to try for each attention, best first. All others try the mask."""


def packer_for(model: PreTrainedModel, micro_batch_tokens: int) -> Packer:
    """Return a packer with the first layout that passes the test for this model.

    A layout passes if its results agree with separate passes. If none does, every response gets
    its own row. That happens to models without an attention mask over positions (state space,
    ALiBi), or with a window shorter than the test's tree.
    """
    attention = attention_of(model)
    # Eager attention adds its mask to the scores, so True would count as 1.
    eager = model.dtype if attention == "eager" else None
    layouts = LAYOUTS.get(attention, (Layout.MASK,))
    if _device_of(model).type != "cpu":
        # Only a CPU uses segments.
        layouts = tuple(layout for layout in layouts if layout != Layout.SEGMENTS)
    ways = [Packer(micro_batch_tokens, layout, mask_dtype=eager) for layout in layouts]
    packer = next((packer for packer in ways if _agrees(model, packer)), None)
    if packer is None:
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
def _agrees(model: PreTrainedModel, packer: Packer) -> bool:
    """Return whether packed and separate passes agree on two trees of 26 tokens in all.

    An error of the packed pass alone means that the model refuses the mask. Errors of memory or
    device, and those of the separate passes, are raised.
    """
    if "local" in getattr(model.config, "attention_layers", ()):
        return False  # GPT-Neo's window counts places in the row, and is longer than these trees
    # Varied ids without 0, which is often the padding token.
    top = num_embeddings(model) - 1
    ids = tuple(1 + (7 * i) % top for i in range(26))
    trees = [PromptTree(ids[:6], (ids[6:12], ids[12:20])), PromptTree(ids[20:23], (ids[23:],))]
    device = _device_of(model)
    alone = Packer(len(ids), Layout.ALONE)
    plain = [_features(model, row.to(device)) for row in alone.rows(trees)]
    together = replace(packer, micro_batch_tokens=len(ids))
    try:
        packed = [_features(model, row.to(device)) for row in together.rows(trees)]
    except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError) as error:
        if is_of_the_device(error):
            raise
        return False
    difference = (torch.cat(packed) - torch.cat(plain)).abs().max().item()
    is_exact = model.dtype == torch.float32 and not torch.is_autocast_enabled(device.type)
    return difference < (PACKING_TOLERANCE if is_exact else HALF_TOLERANCE)


def _device_of(model: PreTrainedModel) -> torch.device:
    return next(model.parameters()).device


def _features(model: PreTrainedModel, row: PackedRow) -> Tensor:
    """Return hidden states (tokens, model) at the positions that predict a row's tokens."""
    return features_of(model, **row.model_inputs)[0, row.predictors].float()
