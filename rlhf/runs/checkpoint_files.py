"""Stores a training state as a folder of safetensors and JSON files.

    manifest.json       which run and step, and the SHA-256 of every other file and of itself
    state.json          plain values of all parts
    PART.safetensors    tensors of a part, nested names joined by "/"

Where ZeRO or FSDP2 splits the model, every process writes its own state, with its shards:

    rank-K.json         plain values of process K, counted from 0
    rank-K.safetensors  its tensors

A part's state is a mapping of names to tensors, plain JSON values, and mappings of these. A
checkpoint that is not whole, or was altered, is refused by name. It is written under another name,
synced to the disk and renamed, so a machine that fails leaves no incomplete checkpoint under a
checkpoint's name. Loading runs no code from the folder, because nothing in it is a pickle.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.inputs.whole_files import sync_to_disk
from rlhf.runs.files import sha256_of
from rlhf.runs.stateful import State

MANIFEST = "manifest.json"
PLAIN = ".json"
STATE = "state" + PLAIN
SHARD = "rank-"
TENSORS = ".safetensors"
UNFINISHED = ".part"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a checkpoint."""

    step: int
    """The last step in the checkpoint, as metrics.jsonl counts steps."""
    seconds: float
    """Wall time that the run has taken so far."""
    num_processes: int
    run: dict[str, Any]
    """The run's identity (see rlhf.runs.run.Run.identity)."""
    files: dict[str, str]
    """Maps each file to its SHA-256."""


def start_checkpoint(folder: Path) -> None:
    """Make the folder of a checkpoint under another name, which `finish_checkpoint` renames.

    Raises:
        OSError: The folder cannot be made.
    """
    with _whole_or_nothing(folder) as part:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)


def write_shard(folder: Path, rank: int, state: State) -> dict[str, str]:
    """Write the state of one process into a checkpoint that was started.

    Returns:
        The SHA-256 of each file by name.

    Raises:
        OSError: The disk is full, or cannot be written. No part of the checkpoint is left then.
    """
    with _whole_or_nothing(folder) as part:
        return _write_states(part, {shard_name(rank): state}, shard_name(rank) + PLAIN)


def finish_checkpoint(
    folder: Path,
    states: Mapping[str, State],
    *,
    step: int,
    seconds: float,
    num_processes: int,
    run: dict[str, Any],
    shards: Mapping[str, str],
) -> None:
    """Write the parts that all processes share, and rename the checkpoint to `folder`.

    Args:
        shards: The hashes that `write_shard` returned in all processes.

    Raises:
        OSError: The disk is full, or cannot be written. No part of the checkpoint is left then.
    """
    with _whole_or_nothing(folder) as part:
        files = {**_write_states(part, states, STATE), **shards}
        manifest = Manifest(
            step=step, seconds=seconds, num_processes=num_processes, run=run, files=files
        )
        body = {"format": FORMAT, **asdict(manifest)}
        _write_json(part / MANIFEST, {**body, "sha256": _sha256_of_json(body)})
        sync_to_disk(part)
        part.rename(folder)
        sync_to_disk(folder.parent)
        sync_to_disk(folder.parent.parent)


def shard_name(rank: int) -> str:
    """Return the name of the files of one process, without their ending."""
    return f"{SHARD}{rank}"


def read_manifest(folder: Path) -> Manifest:
    """Read what a checkpoint holds and which run wrote it.

    Raises:
        ValueError: The manifest is missing, altered, or has another format.
    """
    body = _read_json(folder, MANIFEST)
    written = body.pop("sha256", None)
    if written != _sha256_of_json(body):
        raise ValueError(_altered(folder / MANIFEST, _sha256_of_json(body), written))
    if body.pop("format", None) != FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} is not of format {FORMAT}, which this version of the program "
            f"reads; go on with the version that wrote it, {_or_start_anew(folder)}"
        )
    return Manifest(**body)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that every file except the shards is there and unaltered.

    Raises:
        ValueError: A file is missing or altered; the message names the first one.
    """
    shared = [name for name in manifest.files if not name.startswith(SHARD)]
    _check(folder, manifest, shared)


def check_shard(folder: Path, rank: int) -> None:
    """Check that the files of one process are there and unaltered.

    Raises:
        ValueError: A file is missing or altered; the message names the first one.
    """
    manifest = read_manifest(folder)
    _check(folder, manifest, [n for n in manifest.files if Path(n).stem == shard_name(rank)])


def read_states(folder: Path) -> dict[str, State]:
    """Read the states of all parts that processes share. Call `check_files` first."""
    return _read_states(folder, STATE)


def read_shard(folder: Path, rank: int) -> State:
    """Read the state that one process wrote. Call `check_shard` first."""
    name = shard_name(rank)
    return _read_states(folder, name + PLAIN)[name]


def newest_checkpoint(parent: Path) -> Path | None:
    """Return the checkpoint of the latest step below a folder, or None if there is none."""
    folders = [path for path in parent.glob("step-*") if path.suffix != UNFINISHED]
    return max(folders, key=_step_in_name, default=None)


def checkpoint_folder(parent: Path, step: int) -> Path:
    return parent / f"step-{step}"


def remove_others(folder: Path) -> None:
    """Remove all other checkpoints in the same folder, and the remains of unfinished ones."""
    for other in folder.parent.glob("step-*"):
        if other != folder:
            shutil.rmtree(other, ignore_errors=True)


@contextmanager
def _whole_or_nothing(folder: Path) -> Iterator[Path]:
    """Give the folder that a checkpoint is written to, and remove it if that fails."""
    part = folder.with_name(folder.name + UNFINISHED)
    try:
        yield part
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise OSError(f"{folder} could not be written: {error}") from error


def _write_states(folder: Path, states: Mapping[str, State], plain_name: str) -> dict[str, str]:
    """Write the files and return the SHA-256 of each by name.

    Args:
        plain_name: Name of the file that takes the plain values.
    """
    plain: dict[str, State] = {}
    written = [folder / plain_name]
    for name, state in states.items():
        tensors = dict(_tensors(state))
        plain[name] = _without_tensors(state)
        if tensors:
            written.append(folder / (name + TENSORS))
            save_file(tensors, written[-1])
            sync_to_disk(written[-1])
    _write_json(folder / plain_name, plain)
    return {path.name: sha256_of(path) for path in written}


def _read_states(folder: Path, plain_name: str) -> dict[str, State]:
    states: dict[str, State] = _read_json(folder, plain_name)
    for name, state in states.items():
        path = folder / (name + TENSORS)
        if path.is_file():
            for tensor_name, tensor in _load_file(path).items():
                # A copy, because the tensor maps the file, which a later checkpoint removes.
                _put(state, tensor_name.split("/"), tensor.clone())
    return states


def _check(folder: Path, manifest: Manifest, names: Sequence[str]) -> None:
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing; put it back, {_or_start_anew(folder)}")
        found = sha256_of(path)
        if found != manifest.files[name]:
            raise ValueError(_altered(path, found, manifest.files[name]))


def _tensors(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for name, value in state.items():
        if isinstance(value, Tensor):
            assert "/" not in name, name
            yield prefix + name, value.detach().contiguous()
        elif isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{name}/")


def _without_tensors(state: State) -> State:
    return {
        name: _without_tensors(value) if isinstance(value, dict) else value
        for name, value in state.items()
        if not isinstance(value, Tensor)
    }


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is altered ({error}); {_or_start_anew(path.parent)}") from error


def _put(state: State, names: list[str], tensor: Tensor) -> None:
    *outer, last = names
    for name in outer:
        state = state[name]
    state[last] = tensor


def _step_in_name(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    if not path.is_file():
        raise ValueError(f"{path} is missing; put it back, {_or_start_anew(folder)}")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is altered ({error}); {_or_start_anew(folder)}") from error
    if not isinstance(value, dict):
        raise ValueError(
            f"{path} is altered (it does not hold an object); {_or_start_anew(folder)}"
        )
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    # Python's own JSON, because it reads NaN and Infinity back, and floats to the last bit.
    path.write_text(json.dumps(value, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_to_disk(path)


def _sha256_of_json(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _altered(path: Path, found: str, written: object) -> str:
    was = written[:12] if isinstance(written, str) else "none"
    return f"{path} is altered (sha256 {found[:12]}, written {was}); {_or_start_anew(path.parent)}"


def _or_start_anew(folder: Path) -> str:
    return f"or delete {folder} to start anew"
