"""Log-probabilities of the tokens that were sampled, in fp32."""

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
