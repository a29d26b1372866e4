"""Log-probabilities and entropies of the tokens that were sampled, in fp32."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def token_logprobs(
    logits: Float[Tensor, "*tokens vocab"],
    targets: Int[Tensor, "*tokens"],
    temperature: float = 1.0,
) -> Float[Tensor, "*tokens"]:
    """log softmax(logits / temperature)[target], in nats.

    The temperature must be the sampler's: otherwise these are not the log-probabilities of the
    policy that sampled, and the KL to the reference climbs by itself.
    """
    scaled = logits.float() / temperature
    chosen = scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return chosen - scaled.logsumexp(-1)


@torch.no_grad()
def token_entropy(
    logits: Float[Tensor, "*tokens vocab"], temperature: float = 1.0
) -> Float[Tensor, "*tokens"]:
    """Entropy of softmax(logits / temperature), in nats; for the log only, without gradient."""
    probabilities = (logits.float() / temperature).softmax(-1)
    return torch.special.entr(probabilities).sum(-1)  # 0 where a probability is 0
