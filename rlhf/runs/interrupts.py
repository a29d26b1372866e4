"""Handles Ctrl-C and SIGTERM: the program ends at once, or after a step whose state is saved."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_NOTE = b"\nfinishing this step and saving a checkpoint first; once more ends at once\n"


class Interrupted(KeyboardInterrupt):
    """Ends a run after a signal. Its text says how to resume."""


class Interrupts:
    """Records the signals to end that this process received."""

    def __init__(self) -> None:
        self.are_deferred = False
        """Whether a loop looks for signals at the end of its steps."""
        self.is_pending = False
        """Whether a signal came while they are deferred."""

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Raise KeyboardInterrupt for both signals: at once, unless they are deferred."""
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
        os.write(2, _NOTE)  # no print, since the signal may have interrupted one


interrupts = Interrupts()
"""One object for the process, since signals go to the process as a whole."""
