"""KL divergence from the reference policy: as a penalty in the reward, and as a meter.

With log_ratio = log pi(token) - log pi_ref(token) of tokens sampled from pi (Schulman 2020,
"Approximating KL divergence"):

    k1 = log_ratio                      unbiased, may be negative; the only one right in a reward
    k3 = exp(-log_ratio) - 1 + log_ratio     unbiased, never negative, low variance; for the log
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def k1(
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """log pi - log pi_ref a token, in nats, 0 where no token is; a row's sum estimates its KL."""
    return (logprobs - ref_logprobs).where(response_mask, 0.0)


def k3(
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
) -> Float[Tensor, "batch time"]:
    """pi_ref/pi - 1 - log(pi_ref/pi) a token, never negative, 0 where no token is."""
    log_ratio = k1(logprobs, ref_logprobs, response_mask)
    return torch.expm1(-log_ratio) + log_ratio


def penalized_rewards(
    scores: Float[Tensor, "batch"],
    logprobs: Float[Tensor, "batch time"],
    ref_logprobs: Float[Tensor, "batch time"],
    response_mask: Bool[Tensor, "batch time"],
    kl_coef: float,
) -> Float[Tensor, "batch time"]:
    """R_t = -kl_coef (log pi - log pi_ref)_t, and the score on the last token of the response.

    Summed over a response this is score - kl_coef log(pi / pi_ref), the objective of InstructGPT
    (Ouyang et al. 2022, eq. 2). An empty response gets no reward.
    """
    rewards = -kl_coef * k1(logprobs, ref_logprobs, response_mask)
    return rewards + scores[:, None].where(last_token_mask(response_mask), 0.0)


def last_token_mask(response_mask: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
    """True at each response's last token."""
    following = torch.nn.functional.pad(response_mask[:, 1:], (0, 1))
    return response_mask & ~following


def adapt_kl_coef(
    kl_coef: float, kl: float, *, target: float, num_episodes: int, horizon: int
) -> float:
    """The next penalty, raised while the KL is above its target and lowered while below.

        error = clip(kl / target - 1, -0.2, 0.2);  kl_coef <- kl_coef (1 + error episodes / horizon)

    (Ziegler et al. 2019, section 2.2; their code counts episodes against a horizon of 10,000.)

    Args:
        kl, target: mean nats a response, k1.
        num_episodes: episodes since the last call.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_episodes / horizon)
