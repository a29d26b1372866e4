"""Run the parts in a worker process; end it if a part fails or takes too long.

One worker runs one part after the other, so that packages are imported once. After a failed part a
new worker starts, since an error of a GPU can break all that its process does later.
"""

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_check.parts import Part
from benchmarks.gpu_check.records import RECORDS, Record
from benchmarks.protocol import environment

POLL_SECONDS = 0.1
LAST_LINES = 3
"""Last lines of a worker's log that are shown if it ended."""


def worker_command(folder: Path, names: str) -> list[str]:
    """Return what starts a worker that runs these parts, comma-separated."""
    return [sys.executable, "-m", "benchmarks.gpu_check.worker", str(folder), names]


class Worker:
    """Holds a process that runs parts in order, and reads their records."""

    def __init__(self, parts: Sequence[Part], folder: Path, arguments: Sequence[str]) -> None:
        self._records = folder / RECORDS
        self._records.mkdir(parents=True, exist_ok=True)
        for part in parts:
            self._path(part).unlink(missing_ok=True)
        self._log = folder / f"log-from-{parts[0].name}.txt"
        names = ",".join(part.name for part in parts)
        threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*worker_command(folder, names), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | environment(threads),
                start_new_session=True,  # so that `stop` also ends what the worker started
            )

    def wait_for(self, part: Part, seconds: float) -> Record:
        """Wait until a part ends, for at most `seconds`; return its record, never `running`."""
        started = time.monotonic()
        while True:
            has_ended = self._process.poll() is not None  # before the record is read
            record = self._read(part)
            waited = time.monotonic() - started
            if record.status != "running":
                return record
            if has_ended or waited > seconds:
                self.stop()
                reason = (
                    f"its process ended with code {self._process.returncode}: {self._last_lines()}"
                    if has_ended
                    else f"it was stopped after {waited:.0f} s; the limit is {seconds:.0f} s"
                )
                return replace(record.ended("failed", reason), seconds=waited)
            time.sleep(POLL_SECONDS)

    def stop(self) -> None:
        """End the worker and all that it started."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _path(self, part: Part) -> Path:
        return self._records / f"{part.name}.json"

    def _read(self, part: Part) -> Record:
        try:
            return Record.from_json(self._path(part).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return Record(part.name, part.question, "running")

    def _last_lines(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " / ".join(line.strip() for line in lines[-LAST_LINES:])


def run_parts(
    parts: Sequence[Part],
    folder: Path,
    arguments: Sequence[str],
    *,
    seconds: float,
    emit: Callable[[Record], object],
) -> list[Record]:
    """Run all parts and return their records, of which none is `running`.

    Args:
        arguments: Options of the worker.
        seconds: Time limit of all parts together.
        emit: Gets each record as soon as it is there.
    """
    records: list[Record] = []
    waiting = deque(parts)
    deadline = time.monotonic() + seconds
    worker: Worker | None = None
    try:
        while waiting:
            part, left = waiting[0], deadline - time.monotonic()
            if left <= 0:
                reason = f"no time is left of {seconds:.0f} s"
                record = Record(part.name, part.question, "skipped", reason=reason)
            else:
                worker = worker or Worker(list(waiting), folder, arguments)
                record = worker.wait_for(part, min(part.seconds, left))
            if record.status == "failed" and worker is not None:
                worker.stop()
                worker = None
            waiting.popleft()
            records.append(record)
            emit(record)
    finally:
        if worker is not None:
            worker.stop()
    return records
