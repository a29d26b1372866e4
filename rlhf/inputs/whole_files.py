"""Writes files so that each is the old one or the whole new one, even if writing is cut off."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a temporary file to write to, and move it to `path` once it is on the disk.

    A reader sees the old file or the whole new one. An error inside leaves the old one unchanged.
    """
    beside = path.with_name(path.name + ".part")
    try:
        yield beside
        sync_to_disk(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with written_whole(path) as file:
        file.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Wait until a file, or a rename in a folder, is on the disk and not only in memory.

    Windows can sync neither folders nor files that were opened for reading.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
