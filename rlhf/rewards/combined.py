"""Combines rewards: weighted parts, ensembles, and scores brought to a common scale."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.generation.answers import Answer
from rlhf.rewards.scores import (
    UNSCALED,
    Reward,
    Scored,
    ScoreScale,
    combine_members,
    spread,
)
from rlhf.rewards.settings import Combination


@dataclass(frozen=True)
class RewardPart:
    """Holds one reward of a weighted sum, and which answers it judges."""

    reward: Reward
    weight: float = 1.0
    only_with: str | None = None
    """Judge only answers to prompts whose meta has a true value under this key. None: judge all."""
    only_without: str | None = None
    """Leave out answers to prompts whose meta has a true value under this key."""
    scale: ScoreScale = UNSCALED
    """Common scale to which the scores are brought before they are weighted."""

    def judges(self, answer: Answer) -> bool:
        """Return whether this part scores the answer."""
        meta = answer.record.meta
        return (self.only_with is None or bool(meta.get(self.only_with))) and (
            self.only_without is None or not meta.get(self.only_without)
        )

    def score(self, answers: Sequence[Answer]) -> tuple[Scored, Tensor]:
        """Score a batch.

        Returns:
            The weighted scores on the common scale, 0 for answers that this part does not judge;
            and the reward's own scores (batch,), with nan for those.
        """
        places = [i for i, answer in enumerate(answers) if self.judges(answer)]
        own = torch.full((len(answers),), math.nan)
        weighted = torch.zeros(len(answers))
        if not places:
            return Scored(weighted), own
        judged = [answers[i] for i in places]
        scored = self.reward.score(judged)
        lengths = torch.tensor([float(len(answer.response_ids)) for answer in judged])
        own[places] = scored.scores
        weighted[places] = self.weight * self.scale.apply(scored.scores, lengths)
        if scored.token_rewards is None:
            return Scored(weighted), own
        steps = torch.zeros(len(answers), max(len(answer.response_ids) for answer in answers))
        width = scored.token_rewards.shape[1]
        steps[places, :width] = self.weight * (scored.token_rewards / self.scale.std)
        return Scored(weighted, token_rewards=steps), own


@dataclass(frozen=True)
class WeightedReward:
    """Returns score = sum of weight * part, over the parts that judge an answer."""

    parts: Mapping[str, RewardPart]
    """Maps a name to a part."""

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does.

        `parts` holds the rewards' own scores, before scale and weight. They are nan for answers
        that a part does not judge.
        """
        scored = {name: part.score(answers) for name, part in self.parts.items()}
        steps = [one.token_rewards for one, _ in scored.values() if one.token_rewards is not None]
        return Scored(
            _sum([one.scores for one, _ in scored.values()]),
            token_rewards=_sum(steps) if steps else None,
            parts={name: own for name, (_, own) in scored.items()},
        )


@dataclass(frozen=True)
class EnsembleReward:
    """Combines several rewards into one by `combine_members` (Coste et al. 2023)."""

    members: Sequence[Reward]
    combination: Combination
    spread_coef: float

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does. `parts` holds the members' scores and their variance."""
        scores = torch.stack(
            [member.score(answers).scores for member in self.members]
        )  # (members, batch)
        return Scored(
            combine_members(scores, self.combination, self.spread_coef),
            parts={
                **{f"member_{i}": of_member for i, of_member in enumerate(scores)},
                "spread": spread(scores),
            },
        )


@dataclass(frozen=True)
class NormalizedReward:
    """Returns the scores of a reward on a common scale. The parts stay unchanged."""

    reward: Reward
    scale: ScoreScale

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does. What the scale subtracts, it subtracts at the last token."""
        scored = self.reward.score(answers)
        token_rewards = scored.token_rewards
        lengths = torch.tensor([float(len(answer.response_ids)) for answer in answers])
        return replace(
            scored,
            scores=self.scale.apply(scored.scores, lengths),
            token_rewards=None if token_rewards is None else token_rewards / self.scale.std,
        )


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(tensors)).sum(0)
