"""Defines what a reward returns for a batch of responses, and functions that change scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rlhf.generation.answers import Answer
from rlhf.rewards.settings import Combination, MissingEnd


@dataclass(frozen=True)
class Scored:
    """Holds a reward's scores of a batch of responses, before the KL penalty; fp32, on the CPU.

    Example: a response of three tokens has scores [2.0] and token_rewards [[0.5, 0.0, 0.0]]. It is
    worth 2.0 in all: 0.5 at its first token, and the rest (`at_end`) at its last one.
    """

    scores: Tensor
    """(batch,) what each response is worth in all."""
    token_rewards: Tensor | None = None
    """(batch, time) the share of the scores that belongs to single tokens, 0 after the end. None
    means that the whole score belongs to the last token."""
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    """(batch,) each part of the score by name, before its weight. It is nan for answers that the
    part does not judge."""

    @property
    def at_end(self) -> Tensor:
        """(batch,) the share of each score that belongs to the last token."""
        return (
            self.scores if self.token_rewards is None else self.scores - self.token_rewards.sum(1)
        )


@dataclass(frozen=True, kw_only=True)
class ScoreScale:
    """Maps scores of samples to mean 0 and standard deviation 1, with or without their length."""

    mean: float
    """Mean score."""
    std: float
    """Standard deviation of the scores, after the length was taken out."""
    per_token: float = 0.0
    """Slope of the score over the length: what one token more is worth. 0 leaves the length in."""
    mean_tokens: float = 0.0
    """Mean length in tokens."""

    def apply(self, scores: Tensor, lengths: Tensor) -> Tensor:
        """Return (scores - mean - per_token * (lengths - mean_tokens)) / std.

        Args:
            scores: (batch,)
            lengths: (batch,) tokens of each response, including the end token.
        """
        return (scores - self.mean - self.per_token * (lengths - self.mean_tokens)) / self.std


UNSCALED = ScoreScale(mean=0.0, std=1.0)
"""Leaves every score as it is."""


class Reward(Protocol):
    """Anything that scores responses."""

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score a batch of answers."""
        ...


def combine_members(scores: Tensor, combination: Combination, spread_coef: float) -> Tensor:
    """Combine the scores of an ensemble into one (Coste et al. 2023).

        mean                 1/k sum_i R_i
        worst                min_i R_i                        (worst-case optimisation)
        mean_minus_spread    mean - spread_coef * variance    (uncertainty-weighted optimisation)

    Args:
        scores: (members, batch)

    Returns:
        (batch,)
    """
    if combination == "worst":
        return scores.min(0).values
    mean = scores.mean(0)
    return mean if combination == "mean" else mean - spread_coef * spread(scores)


def spread(scores: Tensor) -> Tensor:
    """Return the variance over members, 1/k sum_i (R_i - mean)^2: (members, batch) -> (batch,)."""
    return scores.var(0, correction=0)


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """Clip scores to -limit..limit. None leaves them unchanged."""
    return scores if limit is None else scores.clamp(-limit, limit)


def penalize_length(scores: Tensor, lengths: Tensor, penalty: float, allowance: int) -> Tensor:
    """Return scores - penalty * (tokens beyond the allowance).

    Args:
        scores: (batch,)
        lengths: (batch,) tokens of each response, including the end token.
    """
    return scores - penalty * (lengths - allowance).clamp(min=0)


def adjust_missing_end(
    scores: Tensor, finished_mask: Tensor, mode: MissingEnd, value: float
) -> Tensor:
    """Change the scores of responses that did not end by themselves.

    Without a penalty, policies learn not to stop. "replace" puts `value` in place of the score:
    Huang et al. 2024 (the N+ details) use -1. "subtract" takes `value` off the score, which keeps
    the order among unfinished responses; this is TRL's missing_eos_penalty, usually 1. "none"
    changes nothing.

    Args:
        scores: (batch,)
        finished_mask: (batch,) True where the response ends with its end token.
    """
    if mode == "none":
        return scores
    charged = torch.full_like(scores, value) if mode == "replace" else scores - value
    return torch.where(finished_mask, scores, charged)
