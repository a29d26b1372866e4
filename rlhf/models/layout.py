"""How trees become rows for one model, found by trying."""

import warnings
from dataclasses import replace

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from rlhf.inputs.packing import PackedRow, Packer, PromptTree
from rlhf.models.architectures import features_of, num_embeddings
from rlhf.models.packed_attention import segmented_sdpa
from rlhf.training.out_of_memory import is_of_the_device

AttentionInterface.register("sdpa", segmented_sdpa)

PACKING_TOLERANCE = 1e-3
"""Largest difference of a logit between packed and plain passes that the probe accepts."""


def packer_for(model: PreTrainedModel, micro_batch_tokens: int) -> Packer:
    """How trees are laid out for this model: the first way that a probe finds to agree with
    separate passes, which are themselves the last, one response a row.

    Models without an attention mask over positions (state space, ALiBi), with flash attention, or
    with a window shorter than the probe's tree come to that.
    """
    attention = model.config._attn_implementation
    eager = model.dtype if attention == "eager" else None  # adds its mask: True would count as one
    masks = Packer(micro_batch_tokens, mask_dtype=eager)
    ways = [replace(masks, use_segments=True), masks] if attention == "sdpa" else [masks]
    packer = next((packer for packer in ways if _agrees(model, packer)), None)
    if packer is None:
        warnings.warn(
            f"{type(model).__name__} with {attention} attention cannot take the packing mask; "
            "every response goes through it alone, which is slow",
            stacklevel=2,
        )
        packer = replace(masks, share_prompts=False)
    config = model.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return replace(packer, max_depth=min((window for window in windows if window), default=None))


@torch.no_grad()
def _agrees(model: PreTrainedModel, packer: Packer) -> bool:
    """Whether passes laid this way and separate passes agree, tried on two trees of 26 tokens.

    What stops the separate passes too, and errors of memory or device, are no refusal of the mask.
    """
    if "local" in getattr(model.config, "attention_layers", ()):
        return False  # GPT-Neo cuts its window by places in the row, beyond the probe's tokens
    top = num_embeddings(model) - 1
    ids = tuple(1 + (7 * i) % top for i in range(26))
    trees = [PromptTree(ids[:6], (ids[6:12], ids[12:20])), PromptTree(ids[20:23], (ids[23:],))]
    device = next(model.parameters()).device
    alone = Packer(len(ids), share_prompts=False)
    plain = [_features(model, row.to(device)) for row in alone.rows(trees)]
    together = replace(packer, micro_batch_tokens=len(ids))
    try:
        packed = [_features(model, row.to(device)) for row in together.rows(trees)]
    except (ValueError, TypeError, RuntimeError, NotImplementedError, IndexError) as error:
        if is_of_the_device(error):
            raise
        return False
    difference = (torch.cat(packed) - torch.cat(plain)).abs().max().item()
    tolerance = PACKING_TOLERANCE if model.dtype == torch.float32 else 0.25
    return difference < tolerance


def _features(model: PreTrainedModel, row: PackedRow) -> Tensor:
    """What a row's tokens see: hidden states (tokens, model) at the predicting positions."""
    return features_of(model, **row.model_inputs)[0, row.predictors].float()
