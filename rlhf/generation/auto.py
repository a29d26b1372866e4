"""Provides the engine `auto`, which picks the fastest engine for this model and machine."""

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from transformers import PreTrainedModel

from rlhf.generation.interface import Decoding, Engine, Samples

TRIAL_BATCHES = 2
"""How many batches of the first prompts every engine answers in the trial."""


class FastestEngine:
    """Lets all engines answer the first prompts twice; the fastest the second time does the rest.

    The trial has its own random draws. Engines draw in different orders, so two runs that choose
    different engines have different samples of the same distribution.
    """

    def __init__(
        self, engines: Mapping[str, Engine], batch_size: int, tell: Callable[[str], object]
    ) -> None:
        self.engines = dict(engines)
        self.batch_size = batch_size
        self.tell = tell
        self.chosen: Engine | None = None

    def refresh(self, policy: PreTrainedModel) -> None:
        if self.chosen is not None:
            self.chosen.refresh(policy)
            return
        for name, engine in list(self.engines.items()):
            try:
                engine.refresh(policy)
            except ValueError as error:  # the engine cannot sample this architecture
                self.tell(f"generation: {name} is left out: {error}")
                del self.engines[name]

    def state_dict(self) -> dict[str, str | None]:
        """Return the name of the chosen engine; None before the trial."""
        return {"chosen": next((n for n, e in self.engines.items() if e is self.chosen), None)}

    def load_state_dict(self, state: dict[str, str | None]) -> None:
        chosen = state["chosen"]
        self.chosen = None if chosen is None else self.engines[chosen]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """See `Engine.generate`."""
        if self.chosen is None:
            trial = prompts[: TRIAL_BATCHES * self.batch_size]
            seconds = {
                name: _seconds(engine, trial, decoding) for name, engine in self.engines.items()
            }
            fastest = min(seconds, key=lambda name: seconds[name])
            times = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
            self.tell(f"generation: {len(trial)} responses took {times}; {fastest} samples")
            self.chosen = self.engines[fastest]
        return self.chosen.generate(prompts, decoding, generator, progress)


def _seconds(engine: Engine, prompts: Sequence[Sequence[int]], decoding: Decoding) -> float:
    """Return the seconds of the second of two equal calls; the first also compiles, allocates."""
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        engine.generate(prompts, decoding, torch.Generator().manual_seed(0))
        seconds = time.perf_counter() - started
    return seconds
