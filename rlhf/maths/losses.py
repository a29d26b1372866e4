"""Computes the losses of the reward model and of PPO.

Every loss is a sum divided by a number that the caller gives: the count over the whole (global)
batch. So a loss does not depend on how the batch is split into micro-batches or over processes.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import softplus

from rlhf.maths.masking import masked_sum

MAX_LOG_RATIO = 20.0
"""Limit of the log-ratio. Its exponential, about 5e8, is finite and outside every clip range."""

Stats = dict[str, Tensor]
"""Detached sums over tokens or pairs. Divide by their count to log a mean."""


def ranking_loss(
    scores: Float[Tensor, "responses"],
    preferences: Float[Tensor, "responses responses"],
    tree_index: Int[Tensor, "responses"],
    *,
    num_prompts: int | float,
    weights: Float[Tensor, "responses"] | None = None,
    margins: Float[Tensor, "responses responses"] | None = None,
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute the K-choose-2 pairwise loss over all pairs of a prompt (Ouyang et al. 2022, eq. 1).

        loss = 1 / num_prompts * sum over prompts of weight / pairs * sum over pairs of
               - P_ij log sigmoid(s_i - s_j - m_ij) - P_ji log sigmoid(s_j - s_i - m_ji)

    Each prompt is divided by the number of pairs it really has. So every prompt has the same weight
    (or what `weights` says), whatever its K, its ties and its unranked responses. A prompt without
    any pair adds nothing.

    Args:
        preferences: Probability P_ij that i is preferred to j. P_ij + P_ji is 1 for a pair; both
            are 0 if the two responses are not compared. Ranks give 0 and 1, judgements of an AI or
            a crowd anything between.
        tree_index: Responses with the same number belong to the same prompt.
        num_prompts: Number of prompts with at least one pair in the whole batch, or the sum of
            their weights.
        weights: Weight of each response's prompt, positive. None gives every prompt weight 1.
        margins: m_ij, which is subtracted from s_i - s_j (Touvron et al. 2023, eq. 2). None means
            0.

    Returns:
        The loss, and sums over the pairs in which one response is preferred (P is not 1/2):
        `pairs`, `correct` (the preferred one scores higher; equal scores count half), and `margin`
        (its score minus the other's).
    """
    preferences = preferences.to(scores.dtype)
    compared = preferences > 0
    gaps = (scores[:, None] - scores[None, :]).where(compared, 0.0)  # (responses, responses)
    same_prompt = tree_index[:, None] == tree_index[None, :]
    pairs_of_prompt = (same_prompt * preferences.sum(1)[None, :]).sum(1)  # (responses,)
    shares = preferences / pairs_of_prompt.clamp(min=1)[:, None]
    if weights is not None:
        shares = shares * weights[:, None]
    losses = softplus(-gaps) if margins is None else softplus(margins - gaps)
    loss = (losses * shares).sum() / num_prompts
    gaps = gaps.detach()
    likelier = preferences > 0.5
    stats = {
        "pairs": likelier.sum(),
        "correct": (likelier & (gaps > 0)).sum() + 0.5 * (likelier & (gaps == 0)).sum(),
        "margin": masked_sum(gaps, likelier),
    }
    return loss, stats


def preferences_from_ranks(
    ranks: Int[Tensor, "responses"], tree_index: Int[Tensor, "responses"]
) -> Float[Tensor, "responses responses"]:
    """Return 1 at (i, j) if response i is ranked above response j of the same prompt, else 0.

    Rank 1 is best, equal ranks are ties, and 0 means unranked. Neither ties nor unranked responses
    form a pair.
    """
    ranked = (ranks[:, None] > 0) & (ranks[None, :] > 0)
    same_prompt = tree_index[:, None] == tree_index[None, :]
    return (ranked & same_prompt & (ranks[:, None] < ranks[None, :])).float()


def policy_loss(
    logprobs: Float[Tensor, "batch time"],
    old_logprobs: Float[Tensor, "batch time"],
    advantages: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    *,
    clip_range: float,
    num_tokens: int,
) -> tuple[Float[Tensor, ""], Stats]:
    """Compute the clipped surrogate loss (Schulman et al. 2017, eq. 7), summed / num_tokens.

        ratio = pi / pi_old;   loss = max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range))

    The log-ratio is clipped to +-20, far outside every clip range, so that its exponential is
    finite.

    Returns:
        The loss, and sums over tokens: `ratio`, `clipped` (tokens where the clipped term is the
        larger), and `approx_kl` (the k3 estimate of KL(pi_old || pi)).
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
    """Compute the clipped value loss: half the squared error, summed / num_tokens.

        loss = 1/2 max((V - return)^2, (clip(V, V_old - c, V_old + c) - return)^2)

    where c is `value_clip_range`, in units of the reward (openai/lm-human-preferences). If it is
    far below the spread of the returns, the value model cannot learn. None means no clipping.

    Returns:
        The loss, and one sum over tokens: `value_clipped`.
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
    return loss, {"value_clipped": clipped.sum()}
