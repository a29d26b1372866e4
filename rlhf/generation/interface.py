"""What every engine takes and returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are drawn, and when a response is over."""

    end_id: int
    """The end-of-response token."""
    max_new_tokens: int
    """A response without its end token is cut here."""
    temperature: float
    """Logits are divided by it; 0 takes the likeliest token (greedy)."""
    other_ends: tuple[int, ...] = ()
    """Further tokens that end a response, as a model's files may declare."""

    @property
    def ends(self) -> list[int]:
        """All tokens that end a response."""
        return [self.end_id, *self.other_ends]


class Samples(NamedTuple):
    """One response a prompt, in the order of the prompts, without padding."""

    responses: list[list[int]]
    """Token ids; the last one is an end token where the response finished."""
    logprobs: list[list[float]]
    """Log-probability in nats of each token as the engine saw it, at the sampling temperature
    (greedy: at temperature 1)."""


class Engine(Protocol):
    """A way to sample. The choice changes no result but by floating point and the draws."""

    def refresh(self, policy: PreTrainedModel) -> None:
        """Sample from these weights from now on; to be called after every change of them."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """One response a prompt.

        Args:
            prompts: token ids; repeat a prompt to get several samples of it.
            generator: CPU generator of the draws; None: torch's own.
            progress: called now and then, with the number of responses that ended since the last
                call; 0 says that sampling goes on.

        Raises:
            NonFiniteError: the policy's logits are no numbers.
        """
