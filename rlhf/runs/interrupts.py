"""Ctrl-C and SIGTERM: at once, or at the end of a step from which the run can go on."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nfinishing this step and saving a checkpoint first; once more ends at once\n"


class Interrupted(KeyboardInterrupt):
    """The run was asked to end, and says how to go on."""


class Interrupts:
    """The requests to end that this process got."""

    def __init__(self) -> None:
        self.are_deferred = False
        """A loop looks for them at the end of its steps."""
        self.is_pending = False
        """One came meanwhile."""

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Within, both signals are a KeyboardInterrupt: at once, unless they are deferred."""
        before = [signal.signal(number, self._handle) for number in SIGNALS]
        try:
            yield
        finally:
            self.are_deferred = self.is_pending = False
            for number, handler in zip(SIGNALS, before, strict=True):
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.are_deferred or self.is_pending:
            raise KeyboardInterrupt
        self.is_pending = True
        os.write(2, _NOTE)  # print might be what was interrupted


interrupts = Interrupts()
"""Of this process: signals belong to it as a whole."""
