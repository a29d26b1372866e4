"""Estimates generalised advantages over the tokens of a response."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def generalized_advantages(
    rewards: Float[Tensor, "batch time"],
    values: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    *,
    gamma: float = 1.0,
    gae_lambda: float = 0.95,
) -> tuple[Float[Tensor, "batch time"], Float[Tensor, "batch time"]]:
    """Return advantages and returns (Schulman et al. 2016, eq. 16). Values after the end are 0.

        delta_t  = r_t + gamma V_{t+1} - V_t
        A_t      = delta_t + gamma lambda A_{t+1}
        return_t = A_t + V_t

    Advantages are not whitened here, because returns must come from the unwhitened ones.

    Args:
        values: Value of the state before each token.

    Returns:
        Advantages and returns; 0 where there is no token.
    """
    assert rewards.shape == values.shape == response_mask.shape
    values = values.where(response_mask, 0.0)
    rewards = rewards.where(response_mask, 0.0)
    advantages = torch.zeros_like(rewards)
    following_advantage = rewards.new_zeros(len(rewards))
    following_value = rewards.new_zeros(len(rewards))
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following_value - values[:, t]
        following_advantage = delta + gamma * gae_lambda * following_advantage
        following_value = values[:, t]
        advantages[:, t] = following_advantage
    advantages = advantages.where(response_mask, 0.0)
    return advantages, advantages + values
