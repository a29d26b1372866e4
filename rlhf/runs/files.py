"""Writes JSON of what runs measure, and hashes files."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.inputs.whole_files import write_text


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
