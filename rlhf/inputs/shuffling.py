"""Decides the order in which items are taken, and keeps the place in it."""

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch

Item = TypeVar("Item")


class ShuffledBatches(Iterator[list[Item]], Generic[Item]):
    """Yields batches without end: every item once per pass, each pass in a new order.

    A batch may contain the end of one pass and the start of the next. Batches of size 0 are empty
    and need no items.
    """

    def __init__(self, items: Sequence[Item], batch_size: int, generator: torch.Generator) -> None:
        self._items = items
        self._batch_size = batch_size
        self._generator = generator
        self._waiting: list[int] = []

    def __next__(self) -> list[Item]:
        while len(self._waiting) < self._batch_size:
            self._waiting += torch.randperm(len(self._items), generator=self._generator).tolist()
        taken, self._waiting = self._waiting[: self._batch_size], self._waiting[self._batch_size :]
        return [self._items[i] for i in taken]

    def state_dict(self) -> dict[str, Any]:
        """Return what comes next: the rest of this pass, and the generator of later passes."""
        return {
            "waiting": torch.tensor(self._waiting, dtype=torch.long),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._waiting = state["waiting"].tolist()
        self._generator.set_state(state["generator"])
