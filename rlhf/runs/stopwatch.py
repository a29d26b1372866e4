"""Measures how long each phase of a run takes, and shows progress."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from tqdm import tqdm

from rlhf.training.out_of_memory import memory_of

HEARTBEAT_SECONDS = 30.0


@dataclass
class Stopwatch:
    """Counts seconds by phase. A phase inside another one counts for the outer, so they add up."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Device whose queued work must end before a phase starts or ends."""
    last_phase: str = "start"
    """The phase that is running, otherwise the last one."""
    _seconds: dict[str, float] = field(default_factory=dict)
    _is_running: bool = False

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the seconds inside. If memory runs out there, the error names the phase."""
        with memory_of(name), self._counted(name):
            yield

    @contextmanager
    def _counted(self, name: str) -> Iterator[None]:
        if self._is_running:
            yield
            return
        self._is_running = True
        self.last_phase = name
        started = self._now()
        try:
            yield
        finally:
            self._is_running = False
            self._seconds[name] = self._seconds.get(name, 0.0) + self._now() - started

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()


def is_bar_hidden(is_first_process: bool) -> bool:
    """Return whether to hide a progress bar: only the first process shows one, and TQDM_DISABLE=1
    hides all.

    tqdm itself reads the variable when it is imported, which is too early for stages that are
    forked, and an argument wins over it.
    """
    return not is_first_process or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")


class Heartbeat:
    """Reports the progress of long work every 30 seconds; shorter work is not reported.

    Example:
        engine.generate(prompts, decoding, progress=Heartbeat("sampled", len(prompts), print))
    """

    def __init__(self, what: str, total: int, log: Callable[[str], object]) -> None:
        self.what = what
        self.total = total
        self.log = log
        self.num_done = 0
        self._started = self._told = time.perf_counter()

    def __call__(self, num_done: int) -> None:
        """Add `num_done`, and report if 30 seconds have passed since the last report."""
        self.num_done += num_done
        now = time.perf_counter()
        if now - self._told >= HEARTBEAT_SECONDS:
            self._told = now
            seconds = now - self._started
            self.log(f"{self.what} {self.num_done} of {self.total} after {seconds:.0f} s")


@contextmanager
def progress_shown(
    label: str, total: int, is_first_process: bool = True
) -> Iterator[Callable[[int], object]]:
    """Show how far some work is: a bar, or a line every 30 seconds where bars are hidden. Only the
    first process shows it.

    Yields:
        A function to call with the number of items done since its last call.
    """
    if not is_first_process:
        yield lambda _: None
    elif is_bar_hidden(is_first_process):
        yield Heartbeat(label, total, partial(print, flush=True))
    else:
        with tqdm(total=total, desc=label, leave=False) as bar:
            yield bar.update


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the FLOPs per second of a square matrix product: the best of five.

    It estimates the machine's peak, and other work lowers it. On a CPU five products take tens of
    milliseconds. Without instructions for bfloat16 one takes a fifth of a second, and is enough.
    """
    # Large enough to reach the full rate, small enough to take milliseconds.
    length = 512 if device.type == "cpu" else 8192
    matrix = torch.ones(length, length, device=device, dtype=dtype)
    watch = Stopwatch(device)

    def product() -> float:
        with watch.phase("product"):
            matrix @ matrix
        return watch.take()["product"]

    matrix[:8] @ matrix  # starts threads and loads kernels
    seconds = [product()]
    while len(seconds) < 5 and sum(seconds) < 0.1:
        seconds.append(product())
    return 2.0 * length**3 / min(seconds)
