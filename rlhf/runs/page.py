"""Keeps a page about a run in its folder, for people to look at while the run goes on.

`tools.report` makes the page in a process of its own. So the run goes on if a page fails or needs
too much memory, and the library imports no program that is built on it.
"""

import subprocess
import sys
import time
from pathlib import Path

from rlhf.runs.folder import PAGE

PROGRAM = "tools.report"
MAX_SHARE = 0.05
"""Largest share of a run's time that its pages may take."""
MAX_SECONDS = 120.0
"""Time limit of a page, in seconds."""


class Page:
    """The page of one run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written_at = time.monotonic()
        self._seconds = 1.0  # a guess, until the first page was timed

    @property
    def is_there(self) -> bool:
        return (self._folder / PAGE).is_file()

    def refresh(self, *, is_last: bool = False) -> None:
        """Write the page, unless pages would then take more than MAX_SHARE of the time.

        Args:
            is_last: Whether the run ends now. Then an existing page is always replaced.
        """
        if (
            is_last and self.is_there
        ) or time.monotonic() - self._written_at >= self._seconds / MAX_SHARE:
            self.write()

    def write(self) -> None:
        """Write the page. If that fails, print one line of warning."""
        started = time.monotonic()
        command = [sys.executable, "-m", PROGRAM, str(self._folder)]
        try:
            done = subprocess.run(command, capture_output=True, timeout=MAX_SECONDS, check=False)
            problem = done.stderr.decode(errors="replace").strip() if done.returncode else ""
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
        if problem:
            reason = problem.splitlines()[-1]
            print(f"warning: no new {self._folder / PAGE}: {reason}", flush=True)
        self._written_at = time.monotonic()
        self._seconds = self._written_at - started
