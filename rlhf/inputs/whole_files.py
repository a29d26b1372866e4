"""A file is the old one or the whole new one, whenever its writing is cut off."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a file beside `path` to write to, and puts it in its place once it is on the disk.

    A reader sees the old file or the whole new one; an error inside leaves the old one as it was.
    """
    beside = path.with_name(path.name + ".part")
    try:
        yield beside
        sync_to_disk(beside)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file in UTF-8."""
    with written_whole(path) as file:
        file.write_text(text, encoding="utf-8")


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or what was renamed in a folder, is on the disk and not only in memory.

    Windows can sync neither folders nor files that were opened for reading.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
