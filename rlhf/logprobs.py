"""Log-probabilities of the tokens that were sampled, and how likely sampled tokens should be."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_TOKENS = 1024
"""Tokens whose whole distribution is in memory at once where no gradient is needed."""


class TokenMoments(NamedTuple):
    """Of each token's distribution, all in the shape of the targets."""

    logprobs: Tensor
    """log pi(target), nats"""
    entropy: Tensor
    """E[-log pi(token)], nats"""
    variance: Tensor
    """Var[log pi(token)], nats^2"""


def token_logprobs(
    logits: Float[Tensor, "*tokens vocab"],
    targets: Int[Tensor, "*tokens"],
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """log softmax(logits / temperature)[target], in nats, in fp32.

    The temperature must be the sampler's: otherwise these are not the log-probabilities of the
    policy that sampled, and the KL to the reference climbs by itself.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


@torch.no_grad()
def token_moments(
    logits: Float[Tensor, "tokens vocab"],
    targets: Int[Tensor, "tokens"],
    temperature: float = 1.0,
) -> TokenMoments:
    """`token_logprobs`, with mean and variance of what it would be for a token drawn from pi.

    A token the policy gives no probability (logit -inf) adds nothing to either.
    """
    parts = [
        _moments(some_logits, some_targets, temperature)
        for some_logits, some_targets in zip(
            logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True
        )
    ]
    return TokenMoments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _moments(logits: Tensor, targets: Tensor, temperature: float) -> TokenMoments:
    scaled = logits.float() / temperature
    log_normaliser = scaled.logsumexp(-1)
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_normaliser
    logprobs = scaled - log_normaliser.unsqueeze(-1)
    probabilities = logprobs.exp()
    surprise = -logprobs.where(probabilities > 0, 0.0)
    entropy = (probabilities * surprise).sum(-1)
    variance = (probabilities * surprise.square()).sum(-1) - entropy.square()
    return TokenMoments(chosen, entropy, variance.clamp(min=0))
