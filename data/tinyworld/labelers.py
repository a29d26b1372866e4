"""Simulate labelers, who see the gold preference with their own weights and noise, in coarse steps.

Two of them agree on about 73 % of the pairs that neither calls a tie. InstructGPT's labelers agreed
on 72.6 +- 1.5 % (Ouyang et al. 2022, section 3.4).
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.tinyworld.gold import score_parts
from data.tinyworld.tasks import parse_task
from data.tinyworld.world import World
from rlhf.inputs.records import PromptLike

STEP = 1.0
"""Step to which utilities are rounded. Responses on the same step are ties."""


@dataclass(frozen=True, kw_only=True)
class TinyLabeler:
    """Simulates one labeler.

    Attributes:
        name: Name written into the rankings.
        world: World that the labeler knows.
        weights: Weight of each part of the gold preference for this labeler.
        noise: Standard deviation of the error of one judgement, in units of the utility.
    """

    name: str
    world: World
    weights: Mapping[str, float]
    noise: float

    def rank(
        self, prompt: PromptLike, responses: Sequence[str], generator: random.Random
    ) -> list[int]:
        """Rank the responses: 1 is best, equal ranks are ties, and the ranks have no gaps."""
        task = parse_task(self.world, prompt)
        levels = [
            round(self._utility(score_parts(task, response), generator) / STEP)
            for response in responses
        ]
        order = sorted(set(levels), reverse=True)
        return [order.index(level) + 1 for level in levels]

    def _utility(self, parts: Mapping[str, float], generator: random.Random) -> float:
        exact = sum(self.weights[name] * value for name, value in parts.items())
        return exact + generator.gauss(0.0, self.noise)


_WEIGHTS: Mapping[str, tuple[float, float, float, float, float]] = {
    "Ada": (4.0, 1.0, 1.0, 1.0, 2.0),
    "Ben": (5.2, 0.7, 0.8, 0.8, 1.6),
    "Cleo": (3.0, 1.5, 1.0, 0.6, 2.4),
    "Dov": (3.6, 0.9, 1.4, 1.4, 1.6),
    "Eve": (4.2, 1.1, 0.8, 1.0, 2.4),
}
"""Maps the name of a labeler to the weights of correct, polite, complete, brief and safe."""

NOISE = 1.8  # with this noise two labelers agree on about 73 % of the pairs


def make_labelers(data_dir: str | Path) -> list[TinyLabeler]:
    """Make the five labelers of the world in a data folder."""
    return labelers_of(World.load(data_dir))


def labelers_of(world: World) -> list[TinyLabeler]:
    """Make the five labelers of a world."""
    parts = ("correct", "polite", "complete", "brief", "safe")
    return [
        TinyLabeler(
            name=name, world=world, weights=dict(zip(parts, weights, strict=True)), noise=NOISE
        )
        for name, weights in _WEIGHTS.items()
    ]
