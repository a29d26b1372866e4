"""Defines what every engine takes and returns."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Settings of decoding: how tokens are drawn, and when a response ends."""

    end_id: int
    """The end-of-response token."""
    max_new_tokens: int
    """The length at which a response without its end token is cut."""
    temperature: float
    """The number that logits are divided by; 0 takes the most likely token (greedy)."""
    other_ends: tuple[int, ...] = ()
    """Other tokens that end a response, as a model's files may declare."""
    is_over: Callable[[Sequence[int]], bool] | None = None
    """Returns whether a response ends after these tokens, as after a stop text. vLLM does not call
    it, so the caller cuts the text too. None means no such rule."""

    @property
    def ends(self) -> list[int]:
        """All tokens that end a response."""
        return [self.end_id, *self.other_ends]


class Samples(NamedTuple):
    """One response per prompt, in the order of the prompts, without padding."""

    responses: list[list[int]]
    """Token ids. The last one is an end token if the response finished."""
    logprobs: list[list[float]]
    """Log-probability in nats of each token, as the engine computed it at the sampling temperature
    (for greedy: at temperature 1)."""


class Engine(Protocol):
    """Samples responses. Engines differ only in speed, in rounding and in the draws."""

    copies_weights: bool
    """Whether it samples from a copy of the weights. `refresh` then gathers one weight at a time
    where they are split between processes, and all processes must call it. If not, it samples with
    the policy itself, which must be whole from `refresh` until it has sampled."""

    def refresh(self, policy: PreTrainedModel) -> None:
        """Sample from these weights from now on. Call it after every change of the weights."""

    def release(self) -> None:
        """Free the memory of the weights and of the cache until the next `refresh`."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """Sample one response per prompt.

        Args:
            prompts: Token ids. Repeat a prompt to get several samples of it.
            generator: CPU generator of the draws. None means torch's global one.
            progress: Called with the number of responses that ended since the last call, which may
                be 0.

        Raises:
            NonFiniteError: The policy's logits are not finite.
        """
