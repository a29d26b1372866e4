"""Records where the inputs of a run come from: hashes, earlier results, commit and versions."""

import functools
import json
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from rlhf.runs.files import FileHashes, sha256_of
from rlhf.runs.folder import (
    LINEAGE,
    METRICS,
    RESULTS,
    SAMPLES,
)

BASE_FILE = "base.json"

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors")
_HASHED = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "reward.json",
    "*.safetensors",
    "*.jsonl",
    "*.jsonl.gz",
)
_RUN_FILES = {METRICS, SAMPLES}
_FILE_SUFFIXES = {".jsonl", ".json", ".gz", ".gguf", ".txt", ".yaml"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_input(stage: str, name: str, path: str) -> None:
    """Raise FileNotFoundError unless an input exists or can be a hub id."""
    if Path(path).exists() or path.startswith("hub:"):
        return
    if _HUB_ID.fullmatch(path) is None or Path(path).suffix in _FILE_SUFFIXES:
        raise FileNotFoundError(
            f"{stage} reads {name} from {path}, which does not exist; run the stage that makes "
            f"it, or correct the path"
        )


def describe_input(path: str, hashes: FileHashes) -> dict[str, Any]:
    """Describe an input: SHA-256 of its files, and the results of the run that made it."""
    place = Path(path)
    if not place.exists():
        return {"hub": path}
    folder = place if place.is_dir() else place.parent
    files = sorted(_hashed_files(place)) if place.is_dir() else [place]
    described: dict[str, Any] = {
        "path": path,
        "sha256": {file.name: hashes.of(file) for file in files},
    }
    if (folder / BASE_FILE).is_file():
        described["base"] = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
    if (folder / RESULTS).is_file() and (folder / LINEAGE).is_file():
        described["results"] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        described["lineage_sha256"] = sha256_of(folder / LINEAGE)
    return described


def _hashed_files(folder: Path) -> set[Path]:
    found = {file for pattern in _HASHED for file in folder.glob(pattern) if file.is_file()}
    return {file for file in found if file.name not in _RUN_FILES}


def commit() -> str | None:
    """Return this source tree's commit, with a note if files differ; None outside a git tree."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], stderr=subprocess.DEVNULL)
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.decode().strip() + (" with local changes" if changes.strip() else "")


def versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        versions[package] = _version_of(package)
    return versions


@functools.cache
def _version_of(package: str) -> str:
    """Return its version, which takes two milliseconds to read."""
    return metadata.version(package)
