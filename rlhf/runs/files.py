"""Writes JSON of what runs measure, and hashes files."""

import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.inputs.whole_files import write_text

_COARSEST_TICK_NS = 2_000_000_000
"""Resolution of FAT's file times, two seconds. Other file systems have a finer one."""


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileHashes:
    """Hashes files. A file whose size and time of change are as recorded is not read again.

    Args:
        known: The attribute `recorded` of an earlier object.
    """

    def __init__(self, known: Mapping[str, Sequence[Any]] | None = None) -> None:
        self._known = known or {}
        self.recorded: dict[str, list[Any]] = {}
        """Maps the absolute path of each file to [size in bytes, time in ns, SHA-256]."""

    def of(self, path: Path) -> str:
        """Return the SHA-256 of a file."""
        status = path.stat()
        size, changed = status.st_size, status.st_mtime_ns
        place = os.path.abspath(path)
        known_size, known_time, known = self._known.get(place, (None, None, ""))
        digest = known if (known_size, known_time) == (size, changed) else sha256_of(path)
        # A file may change again within one tick of a file system's clock, and keep its time.
        if time.time_ns() - changed > _COARSEST_TICK_NS:
            self.recorded[place] = [size, changed, digest]
        return digest

    def of_all(self, place: Path) -> dict[str, str]:
        """Return the SHA-256 of a file, or of all files below a folder by their relative paths."""
        files = sorted(one for one in place.rglob("*") if one.is_file()) or [place]
        return {file.relative_to(place).as_posix(): self.of(file) for file in files}


def plain_values(value: Any) -> Any:
    """Turn tensors and NumPy numbers into Python numbers, tuples into lists, paths into text."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    """Turn numbers that JSON cannot hold (nan, inf) into text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(
        _finite(plain_values(value)), ensure_ascii=False, indent=indent, allow_nan=False
    )


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, to_json(value, indent=2) + "\n")
