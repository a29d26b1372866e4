"""Combines rewards: weighted parts, ensembles, and scores brought to a common scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.generation.answers import Answer
from rlhf.rewards.scores import Reward, Scored, ScoreScale, combine_members, spread
from rlhf.rewards.settings import Combination


@dataclass(frozen=True)
class WeightedReward:
    """Returns score = sum of weight * part."""

    parts: Mapping[str, tuple[Reward, float]]
    """Maps a name to a reward and its weight."""

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does. `parts` are the scores before their weights."""
        scored = {name: part.score(answers) for name, (part, _) in self.parts.items()}
        weighted = [(weight, scored[name]) for name, (_, weight) in self.parts.items()]
        token_rewards = [
            weight * part.token_rewards
            for weight, part in weighted
            if part.token_rewards is not None
        ]
        return Scored(
            _sum([weight * part.scores for weight, part in weighted]),
            token_rewards=_sum(token_rewards) if token_rewards else None,
            parts={name: part.scores for name, part in scored.items()},
        )


@dataclass(frozen=True)
class EnsembleReward:
    """Combines several rewards into one (Coste et al. 2023); see combine_members."""

    members: Sequence[Reward]
    combination: Combination
    spread_coef: float

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does. `parts` are the members' scores and their variance."""
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
    """Returns (score of the reward - what the scale takes off) / std; the parts stay unchanged."""

    reward: Reward
    scale: ScoreScale

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does. What is taken off comes off at the last token."""
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
