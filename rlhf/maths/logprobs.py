"""Computes log-probabilities of sampled tokens, and entropy, variance and KL of their
distributions."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Maps features (tokens, model) to logits (tokens, vocab)."""

CHUNK_TOKENS = 512
"""Maximum number of tokens whose logits are in memory at once."""

_IMPOSSIBLE = -1e4
"""A log-probability whose exponential is 0 in fp32 and whose square is finite."""


class TokenMoments(NamedTuple):
    """Statistics of each token's distribution, all in the shape of the targets."""

    logprobs: Tensor
    """log pi(target), nats"""
    entropy: Tensor
    """E[-log pi(token)], nats"""
    variance: Tensor
    """Var[log pi(token)], nats^2"""


class TokenLikelihoods(NamedTuple):
    """The likelihood of each target, in the shape of the targets."""

    logprobs: Tensor
    """log pi(target), nats"""
    is_greedy: Tensor
    """True where no token is more likely than the target, so that greedy decoding takes it"""


def token_logprobs(
    logits: Float[Tensor, "*tokens vocab"],
    targets: Int[Tensor, "*tokens"],
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """Return log softmax(logits / temperature)[target] in nats, in fp32.

    The temperature must be the sampler's. Otherwise these are not the log-probabilities of the
    policy that sampled, and the KL to the reference rises by itself.
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
    """Return `token_logprobs` of head(features), holding logits of CHUNK_TOKENS tokens at a time.

    The backward pass computes each chunk's logits again. So a vocabulary of 256k needs no more
    memory for 100,000 tokens than for 512. The price is one more product with the unembedding.
    """

    def logprobs(some_features: Tensor, some_targets: Tensor) -> Tensor:
        return token_logprobs(head(some_features), some_targets, temperature)

    return _in_chunks(logprobs, features, targets)


def chunked_divergence(
    teacher_features: Float[Tensor, "tokens teacher_model"],
    teacher_head: Head,
    features: Float[Tensor, "tokens model"],
    head: Head,
) -> Float[Tensor, "tokens"]:
    """Return KL(teacher || student) in nats for each token, holding logits of one chunk at a time.

    The KL is over the whole vocabulary, at temperature 1. It is 0 where both give the same logits,
    and so is its gradient, which reaches the student only.
    """

    def divergence(some_taught: Tensor, some_features: Tensor) -> Tensor:
        with torch.no_grad():
            teacher_logits = teacher_head(some_taught)
        return _divergence(teacher_logits, head(some_features))

    return _in_chunks(divergence, teacher_features, features)


@torch.no_grad()
def chunked_likelihoods(
    features: Float[Tensor, "tokens model"], targets: Int[Tensor, "tokens"], head: Head
) -> TokenLikelihoods:
    """Return `chunked_logprobs` at temperature 1, and whether each target is the most likely."""
    parts = [
        _likelihoods(head(some_features), some_targets)
        for some_features, some_targets in _chunks(features, targets)
    ]
    return TokenLikelihoods(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def chunked_moments(
    features: Float[Tensor, "tokens model"],
    targets: Int[Tensor, "tokens"],
    head: Head,
    temperature: float = 1.0,
) -> TokenMoments:
    """Return `chunked_logprobs`, and the entropy and variance of each token's distribution.

    A token without probability (logit -inf) adds nothing to either.
    """
    parts = [
        _moments(head(some_features), some_targets, temperature)
        for some_features, some_targets in _chunks(features, targets)
    ]
    return TokenMoments(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _in_chunks(compute: Callable[[Tensor, Tensor], Tensor], *by_token: Tensor) -> Tensor:
    """Return `compute` of two tensors, (tokens,); the backward pass computes each chunk again."""
    parts = [
        checkpoint(compute, *chunk, use_reentrant=False, preserve_rng_state=False)
        if torch.is_grad_enabled()
        else compute(*chunk)
        for chunk in _chunks(*by_token)
    ]
    return torch.cat(parts)


def _chunks(features: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    split = features.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS)
    return list(zip(*split, strict=True))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature in fp32; the logits themselves if nothing changes."""
    return logits.float() if temperature == 1 else logits.float() / temperature


def _likelihoods(logits: Tensor, targets: Tensor) -> TokenLikelihoods:
    scaled = logits.float()
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return TokenLikelihoods(chosen - scaled.logsumexp(-1), chosen == scaled.amax(-1))


def _divergence(teacher_logits: Tensor, logits: Tensor) -> Tensor:
    """Compute sum_v p_v (log p_v - log q_v), with p the teacher's and q the student's."""
    of_teacher = teacher_logits.float().log_softmax(-1).clamp_(min=_IMPOSSIBLE)
    of_student = logits.float().log_softmax(-1).clamp(min=_IMPOSSIBLE)  # 0 * inf would be NaN
    return (of_teacher.exp() * (of_teacher - of_student)).sum(-1)


def _moments(logits: Tensor, targets: Tensor, temperature: float) -> TokenMoments:
    """Compute `TokenMoments` in few passes over (tokens, vocab), which cost as much as the head."""
    scaled = _scaled(logits, temperature)
    log_normaliser = scaled.logsumexp(-1)
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - log_normaliser
    logprobs = scaled - log_normaliser.unsqueeze(-1)
    weighted = logprobs.exp()
    logprobs.clamp_(min=_IMPOSSIBLE)  # 0 * -inf would be NaN
    mean = weighted.mul_(logprobs).sum(-1)
    variance = weighted.mul_(logprobs).sum(-1) - mean.square()
    return TokenMoments(chosen, -mean, variance.clamp(min=0))
