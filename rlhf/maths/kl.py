"""Computes the KL divergence from the reference policy, as a penalty and for the log.

Both estimators use log_ratio = log pi(token) - log pi_ref(token) of tokens sampled from pi
(Schulman 2020, "Approximating KL divergence"):

    k1 = log_ratio                         unbiased, may be negative; the only right one in a reward
    k3 = exp(-log_ratio) - 1 + log_ratio   unbiased, never negative, low variance; for the log
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def k1(
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """Return log pi - log pi_ref per token, in nats; 0 where there is no token.

    The sum over a row estimates the KL of the whole response."""
    return (logprobs - ref_logprobs).where(response_mask, 0.0)


def k3(
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """Return pi_ref/pi - 1 - log(pi_ref/pi) per token, never negative; 0 without a token."""
    log_ratio = k1(logprobs, ref_logprobs, response_mask)
    return torch.expm1(-log_ratio) + log_ratio


def penalized_rewards(
    scores: Float[Tensor, "batch"],
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    kl_coef: float,
) -> Float[Tensor, "batch time"]:
    """Return R_t = -kl_coef (log pi - log pi_ref)_t, plus the score at the response's last token.

    The sum over a response is score - kl_coef log(pi / pi_ref), the objective of InstructGPT
    (Ouyang et al. 2022, eq. 2). An empty response gets no reward.
    """
    rewards = -kl_coef * k1(logprobs, ref_logprobs, response_mask)
    return rewards + scores[:, None].where(last_token_mask(response_mask), 0.0)


def last_token_mask(response_mask: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """Return a mask that is True at each response's last token."""
    following = torch.nn.functional.pad(response_mask[:, 1:], (0, 1))
    return response_mask & ~following


def adapt_kl_coef(
    kl_coef: float, kl: float, *, target: float, num_episodes: int, horizon: int
) -> float:
    """Return the next KL penalty: higher if the KL is above its target, lower if below.

        error = clip(kl / target - 1, -0.2, 0.2);  kl_coef <- kl_coef (1 + error episodes / horizon)

    (Ziegler et al. 2019, section 2.2. Their code counts episodes and uses a horizon of 10,000.)

    Args:
        kl, target: Mean nats per response, k1.
        num_episodes: Number of episodes since the last call.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)
