"""Checks that the processes on all machines see the same inputs and the same output folder.

The first process writes the output folder. The others read what it wrote: a checkpoint, or the
reward model that all of them score. Where ZeRO or FSDP2 splits the model, all write to a
checkpoint. Without these checks a machine with a disk of its own would fail only then, and the
other machines would wait for it.
"""

import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from accelerate.utils import broadcast_object_list

from rlhf.runs.folder import LOCK, OutputFolder
from rlhf.runs.lineage import check_input
from rlhf.training.processes import gather_from_all

SEEN_WITHIN = 70.0
"""Seconds that a machine may take to see a new file. NFS looks again after at most 60."""
_PAUSE = 0.5


def check_inputs(stage: str, sources: Mapping[str, str]) -> None:
    """Raise FileNotFoundError in all processes if an input is missing in one of them.

    Args:
        sources: Paths or hub ids by name.
    """

    def check() -> None:
        for name, path in sources.items():
            check_input(stage, name, path)

    _in_every_process(check, FileNotFoundError)


def check_output(output: Path, taken: OutputFolder | None) -> None:
    """Raise ValueError in all processes unless each sees the folder that the first one has taken.

    Args:
        taken: The folder, which only the first process has. None in the others.
    """
    if _num_processes() == 1:
        return
    texts = ["" if taken is None else taken.holder]
    broadcast_object_list(texts)

    def check() -> None:
        if taken is None and not _is_seen(output / LOCK, texts[0]):
            raise ValueError(
                f"{output.resolve()} is not the output_dir that the first process writes; all "
                "machines must see it at the same path, so put it on a file system that they share"
            )

    _in_every_process(check, ValueError)


def _in_every_process(check: Callable[[], None], kind: type[Exception]) -> None:
    """Call `check` in all processes. If it raises in one, raise its error in all."""
    count = _num_processes()
    if count == 1:
        return check()

    def check_here() -> None:
        try:
            check()
        except kind as error:
            place = f"process {os.environ['RANK']} of {count}, on {socket.gethostname()}"
            raise kind(f"{place}: {error}") from error

    gather_from_all(check_here, kind)


def _num_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_seen(path: Path, text: str) -> bool:
    """Return whether a file holds this text, now or soon."""
    end = time.monotonic() + SEEN_WITHIN
    while not (path.is_file() and path.read_text(encoding="utf-8") == text):
        if time.monotonic() > end:
            return False
        time.sleep(_PAUSE)
    return True
