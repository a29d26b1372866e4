"""Run each epoch of a TRL Trainer as one sample."""

import time
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from benchmarks.protocol import Link, synchronise


class EpochGate(TrainerCallback):
    """Starts an epoch when the benchmark asks for a sample, and answers at its end.

    Args:
        figures: called at the end of the first epoch; returns what to answer besides the seconds.
        settings: this side's settings in words, for the table.
    """

    def __init__(self, link: Link, figures: Callable[[], dict[str, Any]], settings: str) -> None:
        self.link = link
        self.figures = figures
        self.settings = settings
        self._first: dict[str, Any] | None = None
        self._phases: dict[str, float] = {}
        self._since = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.link.ready(device=str(args.device), settings=self.settings)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        synchronise()
        self._since = time.perf_counter()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._count("gradient")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._count("step")

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._first is None:
            self._first = self.figures()
        phases, self._phases = self._phases, {}
        self.link.done(**self._first, phases=phases)

    def _count(self, phase: str) -> None:
        synchronise()
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._since
        self._since = now
