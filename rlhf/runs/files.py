"""A file is the old one or the whole new one, and it is on the disk."""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def sync_to_disk(path: Path) -> None:
    """What was written to a file, or renamed in a folder, is on the disk, not only with the system.

    Windows can sync neither folders nor files that were opened for reading.
    """
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_values(value: Any) -> Any:
    """Tensors and NumPy numbers as Python numbers, tuples as lists, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    """What JSON cannot hold (nan, inf) as text."""
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


def write_text(path: Path, text: str) -> None:
    """Written beside and renamed: a reader sees the old file or the whole new one."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    sync_to_disk(beside)
    beside.replace(path)
