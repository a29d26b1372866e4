"""Let the benchmark talk to the programs that it compares, by JSON lines over standard streams.

    benchmark                               worker
    the workload                     ->     loads its models
                                     <-     {"ready": {facts about itself}}
    {"run": n}                       ->     runs one sample
                                     <-     {"done": {seconds, peak_bytes, figures}}
    closes the stream                ->     ends

A worker stays alive between samples, so that alternation A B A B costs no start-up. Its peak memory
is that of one program. What libraries print goes to standard error.
"""

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

from benchmarks.workload import Workload

LAST_LINES = 25
PACKAGES = ("torch", "transformers", "trl", "accelerate")


class WorkerError(ValueError):
    """Raised when a worker ended, or gave an unexpected answer."""


class Link:
    """Holds the worker's end of the connection."""

    def __init__(self) -> None:
        self._commands = sys.stdin
        self._answers = _keep_stdout_clean()
        self._started = 0.0
        self.work = Workload.from_json(self._commands.readline())

    def ready(self, **facts: Any) -> None:
        """Report that models are loaded; return when the first sample is to run.

        Raises:
            SystemExit: no sample is to run.
        """
        versions = {name: metadata.version(name) for name in PACKAGES}
        self._answer({"ready": {**facts, "versions": versions}})
        self._wait()

    def done(self, **figures: Any) -> None:
        """Report a sample's figures; return when the next sample is to run.

        Raises:
            SystemExit: no more samples are to run.
        """
        synchronise()
        seconds = time.perf_counter() - self._started
        self._answer({"done": {"seconds": seconds, "peak_bytes": peak_bytes(), **figures}})
        self._wait()

    def _wait(self) -> None:
        if not self._commands.readline():
            raise SystemExit(0)
        synchronise()
        self._started = time.perf_counter()

    def _answer(self, message: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(message) + "\n")
        self._answers.flush()


class Worker:
    """Holds the benchmark's end of the connection, and starts the worker."""

    def __init__(
        self, command: Sequence[str], work: Workload, *, num_threads: int, log: Path
    ) -> None:
        self.name = " ".join(command)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                encoding="utf-8",
                env=os.environ | environment(num_threads),
            )
        self._send(work.to_json())

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Facts that the worker reports about itself.

        Reading them waits until its models are loaded. So start all workers first: they load at
        the same time.
        """
        return self._receive("ready")

    def run(self) -> dict[str, Any]:
        """Run one sample; return its seconds, peak_bytes and figures.

        Raises:
            WorkerError: the worker failed; the message has the last lines that it printed.
        """
        assert self.facts is not None  # waits until the models are loaded
        self._send(json.dumps({"run": 1}))
        return self._receive("done")

    def close(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("ended") from None

    def _receive(self, kind: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._error("ended")
        answer = json.loads(line)
        if kind not in answer:
            raise self._error(f"answered {line.strip()} where {kind!r} was due")
        return answer[kind]

    def _error(self, what: str) -> WorkerError:
        with self.log.open(encoding="utf-8", errors="replace") as file:
            last = "".join(deque(file, LAST_LINES))
        return WorkerError(f"{self.name} {what}; the end of {self.log}:\n{last}")


def environment(num_threads: int) -> dict[str, str]:
    """Return the environment of every worker: equal threads, no network, no trackers."""
    return {
        "OMP_NUM_THREADS": str(num_threads),
        "MKL_NUM_THREADS": str(num_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def peak_bytes() -> int:
    """Return the peak memory of this process: the GPU's if there is one, else resident memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        kilobytes = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        return int(kilobytes.split()[1]) * 1024
    except FileNotFoundError:  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def synchronise() -> None:
    """Wait for the work that is queued on a GPU, so that the clock counts it."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()


def _keep_stdout_clean() -> TextIO:
    """Return the stream of answers; all other output goes to standard error from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers
