"""Choose the rankings of each step, and the pairs of their responses to compare."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.inputs.packing import PackedRow
from rlhf.inputs.records import Ranking
from rlhf.inputs.streams import torch_stream
from rlhf.maths.losses import preferences_from_ranks
from rlhf.training.processes import own_share
from stages.rm.config import Config


class GlobalBatches:
    """Yields this process's share of each global batch as indices, in a new order every epoch.

    The first pass starts after `first_step` steps. Every ranking is seen exactly once an epoch. So
    the last batch of an epoch may be small, and a process may get no ranking of it.
    """

    def __init__(
        self, num_examples: int, config: Config, accelerator: Accelerator, first_step: int = 0
    ) -> None:
        self.num_examples = num_examples
        self.batch_size = config.batch_size
        self.accelerator = accelerator
        self.generator = torch_stream(config.seed, "rm/order")
        num_passes, self.num_skipped = divmod(first_step, len(self))
        for _ in range(num_passes):
            self._draw()

    def __len__(self) -> int:
        return math.ceil(self.num_examples / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order, first = self._draw(), self.num_skipped * self.batch_size
        self.num_skipped = 0
        for start in range(first, self.num_examples, self.batch_size):
            yield own_share(self.accelerator, order[start : start + self.batch_size])

    def _draw(self) -> list[int]:
        return torch.randperm(self.num_examples, generator=self.generator).tolist()


@dataclass(frozen=True)
class Comparisons:
    """Holds what `ranking_loss` needs to know of the responses in a batch or in one row."""

    preferences: Tensor
    """(responses, responses)"""
    tree_index: Tensor
    """(responses,)"""
    weights: Tensor
    """(responses,)"""
    margins: Tensor | None
    """(responses, responses)"""

    def of(self, row: PackedRow) -> "Comparisons":
        """Return the comparisons of a row's responses; an idle row has none."""
        chosen = row.response_index
        square = (chosen[:, None], chosen[None, :])
        margins = None if self.margins is None else self.margins[square]
        return Comparisons(
            self.preferences[square], self.tree_index[chosen], self.weights[chosen], margins
        )

    def to(self, device: torch.device) -> "Comparisons":
        """Copy all tensors from the CPU to a device, without waiting for it."""
        return Comparisons(
            self.preferences.to(device, non_blocking=True),
            self.tree_index.to(device, non_blocking=True),
            self.weights.to(device, non_blocking=True),
            None if self.margins is None else self.margins.to(device, non_blocking=True),
        )


def make_comparisons(rankings: Sequence[Ranking], margin_per_rank: float) -> Comparisons:
    """Return the comparisons of these rankings, with their responses one after another."""
    trees = [tree for tree, ranking in enumerate(rankings) for _ in ranking.responses]
    tree_index = torch.tensor(trees, dtype=torch.long)
    weights = torch.tensor([rankings[tree].weight for tree in trees], dtype=torch.float32)
    ranks = torch.tensor([rank or 0 for one in rankings for rank in one.ranks], dtype=torch.long)
    preferences = preferences_from_ranks(ranks, tree_index)
    start = 0
    for ranking in rankings:
        for i, j, probability in ranking.probabilities:
            preferences[start + i, start + j] = probability
            preferences[start + j, start + i] = 1 - probability
        for i, j in ranking.equal_pairs():
            preferences[start + i, start + j] = preferences[start + j, start + i] = 0.0
        start += len(ranking.responses)
    margins = margin_per_rank * (ranks[None, :] - ranks[:, None]) if margin_per_rank else None
    return Comparisons(preferences, tree_index, weights, margins)
