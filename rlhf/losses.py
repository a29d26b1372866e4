"""Losses of the reward model and of PPO.

Every loss is a sum divided by a number that the caller gives: the count over the whole (global)
batch. So a loss does not depend on how the batch was cut into micro-batches or over processes.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from rlhf.masking import masked_sum

MAX_LOG_RATIO = 20.0

Stats = dict[str, Tensor]
"""Detached sums over tokens or pairs; divide by their count to log a mean."""


def ranking_loss(
    scores: Float[Tensor, "responses"],
    ranks: Int[Tensor, "responses"],
    tree_index: Int[Tensor, "responses"],
    *,
    num_prompts: int,
) -> tuple[Float[Tensor, ""], Stats]:
    """K-choose-2 pairwise loss: all pairs of a prompt together (Ouyang et al. 2022, eq. 1).

        loss = 1 / num_prompts * sum over prompts of
               1 / pairs * sum over pairs (better, worse) of -log sigmoid(s_better - s_worse)

    Normaliser: each prompt is divided by the pairs it really has. Tied and unranked responses form
    no pair, so every prompt weighs the same, whatever its K and its ties; a prompt without any
    pair adds nothing.

    Args:
        ranks: 1 is best, equal ranks are ties, 0 means unranked.
        tree_index: responses with the same number belong to the same prompt.
        num_prompts: prompts with at least one pair in the whole batch.

    Returns:
        loss, and sums over pairs: `correct`, `pairs`, `margin`.
    """
    better = preference_pairs(ranks, tree_index)
    margins = (scores[:, None] - scores[None, :]).where(better, 0.0)  # (responses, responses)
    same_prompt = tree_index[:, None] == tree_index[None, :]
    pairs_of_response = better.sum(1)
    pairs_of_prompt = (same_prompt * pairs_of_response[None, :]).sum(1)  # (responses,)
    weights = better / pairs_of_prompt.clamp(min=1)[:, None]
    loss = (softplus(-margins) * weights).sum() / num_prompts
    margins = margins.detach()
    stats = {
        "pairs": better.sum(),
        "correct": (better & (margins > 0)).sum() + 0.5 * (better & (margins == 0)).sum(),
        "margin": masked_sum(margins, better),
    }
    return loss, stats


def preference_pairs(
    ranks: Int[Tensor, "responses"], tree_index: Int[Tensor, "responses"]
) -> Bool[Tensor, "responses responses"]:
    """True at (i, j) where response i is ranked above response j of the same prompt."""
    ranked = (ranks[:, None] > 0) & (ranks[None, :] > 0)
    same_prompt = tree_index[:, None] == tree_index[None, :]
    return ranked & same_prompt & (ranks[:, None] < ranks[None, :])


def policy_loss(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    *,
    clip_range: float,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], Stats]:
    """Clipped surrogate loss (Schulman et al. 2017, eq. 7), summed over tokens / num_tokens.

        ratio = pi / pi_old;   loss = max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range))

    The log-ratio is cut at +-20, far behind every clip range, so that its exponential is finite.

    Returns:
        loss, and sums over tokens: `ratio`, `clipped` (clipped term in force), `approx_kl`
        (k3 of the step's policy from the rollout's), `max_log_ratio` (a maximum, not a sum).
    """
    log_ratio = (logprobs - old_logprobs).where(response_mask, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip_range, 1 + clip_range)
    loss = masked_sum(torch.maximum(unclipped, clipped), response_mask) / num_tokens
    stats = {
        "ratio": masked_sum(ratio.detach(), response_mask),
        "clipped": (response_mask & (clipped > unclipped)).sum(),
        "approx_kl": masked_sum((ratio - 1 - log_ratio).detach(), response_mask),
        "max_log_ratio": log_ratio.detach().abs().max(),
    }
    return loss, stats


def value_loss(
    values: Float[Tensor, "batch time"],
    old_values: Float[Tensor, "batch time"],
    returns: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    *,
    value_clip_range: float | None,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], Stats]:
    """Half the squared error of the values, clipped around the rollout's, sum / num_tokens.

        loss = 1/2 max((V - return)^2, (clip(V, V_old - c, V_old + c) - return)^2)

    as in openai/lm-human-preferences. `value_clip_range` is in units of the reward: far below the
    spread of the returns it freezes the value model. None: no clipping.

    Returns:
        loss, and sums over tokens: `value_clipped`, `squared_error`.
    """
    values, old_values, returns = (
        tensor.where(response_mask, 0.0) for tensor in (values, old_values, returns)
    )
    error = (values - returns).square()
    loss_terms = error
    clipped = torch.zeros_like(response_mask)
    if value_clip_range is not None:
        near = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        clipped_error = (near - returns).square()
        clipped = response_mask & (clipped_error > error)
        loss_terms = torch.maximum(error, clipped_error)
    loss = 0.5 * masked_sum(loss_terms, response_mask) / num_tokens
    stats = {
        "value_clipped": clipped.sum(),
        "squared_error": masked_sum(error.detach(), response_mask),
    }
    return loss, stats
