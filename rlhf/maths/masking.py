"""Sums and whitens over the tokens that count.

Masks are boolean and True where a token counts, everywhere in this project.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def masked_sum(values: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]) -> Float[Tensor, ""]:
    """Sum over the tokens that count. Values elsewhere, even NaN, change nothing."""
    return values.where(mask, 0.0).sum()


def whitening_sums(
    values: Float[Tensor, "*axes"], mask: Bool[Tensor, "*axes"]
) -> Float[Tensor, "3"]:
    """Return count, sum and sum of squares, which processes add up so that all whiten alike."""
    kept = values.where(mask, 0.0).double()
    return torch.stack([mask.sum().double(), kept.sum(), kept.square().sum()])


def whiten(
    values: Float[Tensor, "*axes"],
    mask: Bool[Tensor, "*axes"],
    sums: Float[Tensor, "3"] | None = None,
    eps: float = 1e-8,
) -> Float[Tensor, "*axes"]:
    """Return (values - mean) / sqrt(variance + eps) over the tokens that count; 0 elsewhere.

    The variance is the biased one, as in openai/lm-human-preferences.

    Args:
        sums: `whitening_sums` added over all processes. None means those of `values` alone.
    """
    count, total, squares = (whitening_sums(values, mask) if sums is None else sums).tolist()
    mean = total / max(count, 1)
    variance = max(squares / max(count, 1) - mean * mean, 0.0)
    return ((values - mean) / (variance + eps) ** 0.5).where(mask, 0.0)
