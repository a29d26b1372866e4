"""Computes log-probabilities of a policy's response tokens over a packed row, and their KL."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.inputs.packing import PackedRow
from rlhf.maths.logprobs import (
    Head,
    TokenLikelihoods,
    TokenMoments,
    chunked_divergence,
    chunked_likelihoods,
    chunked_logprobs,
    chunked_moments,
)
from rlhf.models.architectures import accepted, accepts, body_of, find_body, hidden_states
from rlhf.models.compat import share_storage

_plain_heads: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Results of `has_plain_head`, kept for each policy."""


def response_logprobs(policy: nn.Module, row: PackedRow, temperature: float = 1.0) -> Tensor:
    """Return the log-probability (tokens,) in nats of every response token of a packed row."""
    features, head = _features_and_head(policy, row)
    return chunked_logprobs(features, row.targets, head, temperature)


def response_divergence(policy: nn.Module, teacher: nn.Module, row: PackedRow) -> Tensor:
    """Return KL(teacher || policy) (tokens,) in nats at every response token of a packed row.

    The teacher needs the policy's vocabulary, and gets no gradient."""
    with torch.no_grad():
        taught, teacher_head = _features_and_head(teacher, row)
    features, head = _features_and_head(policy, row)
    return chunked_divergence(taught, teacher_head, features, head)


def response_moments(policy: nn.Module, row: PackedRow, temperature: float = 1.0) -> TokenMoments:
    """Return `response_logprobs` and each token's entropy and variance, all (tokens,).

    Computes no gradient."""
    features, head = _features_and_head(policy, row)
    return chunked_moments(features, row.targets, head, temperature)


@torch.no_grad()
def response_likelihoods(policy: nn.Module, row: PackedRow) -> TokenLikelihoods:
    """Return `response_logprobs` and whether each token is the most likely one, all (tokens,)."""
    features, head = _features_and_head(policy, row)
    return chunked_likelihoods(features, row.targets, head)


@torch.no_grad()
def has_plain_head(policy: nn.Module) -> bool:
    """Return whether logits are the unembedding of the last hidden states and nothing more.

    Some architectures scale or cap them afterwards (Gemma 2, Granite, Cohere). The test compares
    both on three tokens bit for bit, once per model.
    """
    if policy not in _plain_heads:
        plain = False
        head = policy.get_output_embeddings() if isinstance(policy, PreTrainedModel) else None
        if (
            isinstance(policy, PreTrainedModel)
            and isinstance(head, nn.Linear)
            and find_body(policy) is not None
        ):
            ids = torch.tensor([[1, 2, 3]], device=policy.device)
            hidden, logits = hidden_states(policy, input_ids=ids), _logits(policy, input_ids=ids)
            plain = hidden.shape[-1] == head.in_features and torch.equal(head(hidden), logits)
        _plain_heads[policy] = plain
    return _plain_heads[policy]


def record_plain_head(policy: PreTrainedModel) -> None:
    """Store the result of `has_plain_head` for a model without weights, which has no logits."""
    _plain_heads[policy] = _passes_logits_on(policy)


@torch.no_grad()
def _passes_logits_on(policy: PreTrainedModel) -> bool:
    """Return whether the body's output is the head's input, and the head's output the model's.

    This needs no weights."""
    seen: list[Tensor] = []
    head = policy.get_output_embeddings()
    hooks = [
        body_of(policy).register_forward_hook(lambda module, _, output: seen.append(output[0])),
        head.register_forward_hook(lambda module, inputs, output: seen.extend([*inputs, output])),
    ]
    logits = _logits(policy, input_ids=torch.tensor([[1, 2, 3]]))
    for hook in hooks:
        hook.remove()
    *hidden, read, given = seen
    # OPT does not call its own body's forward pass, so there is no hidden state to compare.
    return all(share_storage(one, read) for one in hidden) and share_storage(given, logits)


def _features_and_head(policy: nn.Module, row: PackedRow) -> tuple[Tensor, Head]:
    """Return features (tokens, ...) that predict the response tokens, and the head for them."""
    if has_plain_head(policy):
        assert isinstance(policy, PreTrainedModel)
        hidden = hidden_states(policy, **row.model_inputs)
        return hidden[0, row.predictors], policy.get_output_embeddings()
    if accepts(policy, "logits_to_keep"):
        return _logits(policy, **row.model_inputs, logits_to_keep=row.predictors)[0], nn.Identity()
    return _logits(policy, **row.model_inputs)[0, row.predictors], nn.Identity()


def _logits(policy: nn.Module, **inputs: Any) -> Tensor:
    """Return logits, without a cache and without the router loss that a mixture of experts adds."""
    return policy(**inputs, **accepted(policy, use_cache=False, output_router_logits=False)).logits
