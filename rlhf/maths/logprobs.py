"""Log-probabilities of the tokens that were sampled, and how likely sampled tokens should be."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Features (tokens, model) -> logits (tokens, vocab)."""

CHUNK_TOKENS = 512
"""Tokens whose whole distribution is in memory at once."""

_IMPOSSIBLE = -1e4
"""A log-probability whose exponential is 0 in fp32, and whose square is finite."""


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
    scaled = _scaled(logits, temperature)
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


def chunked_logprobs(
    features: Float[Tensor, "tokens model"],
    targets: Int[Tensor, "tokens"],
    head: Head,
    temperature: float = 1.0,
) -> Float[Tensor, "tokens"]:
    """`token_logprobs` of head(features), at most CHUNK_TOKENS tokens' logits at a time.

    The backward pass makes each chunk's logits again, so a vocabulary of 256k costs no more memory
    for 100,000 tokens than for 512; the price is one more product with the unembedding.
    """

    def logprobs(some_features: Tensor, some_targets: Tensor) -> Tensor:
        return token_logprobs(head(some_features), some_targets, temperature)

    parts = [
        checkpoint(logprobs, *chunk, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else logprobs(*chunk)
        for chunk in _chunks(features, targets)
    ]
    return torch.cat(parts)


@torch.no_grad()
def chunked_moments(
    features: Float[Tensor, "tokens model"],
    targets: Int[Tensor, "tokens"],
    head: Head,
    temperature: float = 1.0,
) -> TokenMoments:
    """`chunked_logprobs`, with mean and variance of what it would be for a token drawn from pi.

    A token the policy gives no probability (logit -inf) adds nothing to either.
    """
    parts = [
        _moments(head(some_features), some_targets, temperature)
        for some_features, some_targets in _chunks(features, targets)
    ]
    return TokenMoments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _chunks(features: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    split = features.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS)
    return list(zip(*split, strict=True))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """In fp32; the logits themselves where there is nothing to change."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def _moments(logits: Tensor, targets: Tensor, temperature: float) -> TokenMoments:
    """In as few passes over (tokens, vocab) as it takes: they cost as much as the unembedding."""
    scaled = _scaled(logits, temperature)
    log_normaliser = scaled.logsumexp(-1)
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_normaliser
    logprobs = scaled - log_normaliser.unsqueeze(-1)
    weighted = logprobs.exp()
    logprobs.clamp_(min=_IMPOSSIBLE)  # 0 * -inf would be NaN
    mean = weighted.mul_(logprobs).sum(-1)
    variance = weighted.mul_(logprobs).sum(-1) - mean.square()
    return TokenMoments(chosen, -mean, variance.clamp(min=0))
