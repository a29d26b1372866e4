"""A checkpoint is whole and unaltered, or refused by the name of the faulty file.

The checkpoint before it stays until the new one is whole.
"""

import json
import math
import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.runs import checkpoint_files
from rlhf.runs.checkpoint_files import (
    check_files,
    check_shard,
    checkpoint_folder,
    finish_checkpoint,
    newest_checkpoint,
    read_manifest,
    read_shard,
    read_states,
    remove_others,
    start_checkpoint,
    write_shard,
)

STATES: dict[str, dict[str, Any]] = {
    "models": {"a.weight": torch.randn(3, 2), "a.half": torch.randn(5).bfloat16()},
    "optimizer": {
        "moments": {"a.weight": {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3).T}},
        "groups": [{"lr": 0.1 + 0.2, "betas": [0.9, 0.95], "maximize": False, "foreach": None}],
    },
    "monitor": {"history": [{"ppo/kl": math.nan, "ppo/score": -math.inf}], "alarms": {}},
    "generators": {"0": {"torch": torch.get_rng_state(), "python": {"next": None}}},
}


SHARDS = [
    {"zero": {"weights": {"0": torch.randn(4)}, "groups": [{"lr": 0.1 * rank}]}, "empty": {}}
    for rank in (1, 2)
]
"""The states of two processes, which differ in every value."""


def write(parent: Path, step: int = 4, *, shards: Sequence[dict[str, Any]] = ()) -> Path:
    folder = checkpoint_folder(parent, step)
    start_checkpoint(folder)
    written = [write_shard(folder, rank, state) for rank, state in enumerate(shards)]
    finish_checkpoint(
        folder,
        STATES,
        step=step,
        seconds=1.5,
        num_processes=1,
        run={"stage": "ppo"},
        shards={name: sha for files in written for name, sha in files.items()},
    )
    return folder


def load(folder: Path) -> dict[str, Any]:
    check_files(folder, read_manifest(folder))
    return read_states(folder)


def equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[k], expected[k]) for k in found)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, float) and math.isnan(expected):
        return math.isnan(found)
    return type(found) is type(expected) and found == expected


def test_states_come_back_to_the_bit(tmp_path: Path) -> None:
    folder = write(tmp_path)
    assert equal(load(folder), STATES)
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.seconds, manifest.run) == (4, 1.5, {"stage": "ppo"})
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def names_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("damage", ["removed", "changed", "truncated", "emptied"])
def test_every_file_that_is_not_as_written_is_named(tmp_path: Path, damage: str) -> None:
    names = names_of(write(tmp_path / "whole"))
    assert len(names) == 5
    for name in names:
        path = write(tmp_path / name) / name
        content = path.read_bytes()
        if damage == "removed":
            path.unlink()
        elif damage == "changed":  # a digit or a bit of a weight
            path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        else:
            path.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"")
        expected = "missing" if damage == "removed" else "altered"
        with pytest.raises(ValueError, match=f"{name} is {expected}.*delete .*step-4 to start"):
            load(path.parent)


def test_every_process_reads_its_own_shard(tmp_path: Path) -> None:
    folder = write(tmp_path, shards=SHARDS)
    assert [name for name in names_of(folder) if name.startswith("rank-")] == [
        "rank-0.json", "rank-0.safetensors", "rank-1.json", "rank-1.safetensors"
    ]  # fmt: skip
    for rank, state in enumerate(SHARDS):
        check_shard(folder, rank)
        assert equal(read_shard(folder, rank), state)
    assert equal(load(folder), STATES)


@pytest.mark.parametrize("name", ["rank-1.json", "rank-1.safetensors"])
@pytest.mark.parametrize("damage", ["removed", "changed", "truncated"])
def test_a_shard_that_is_not_as_written_is_named_by_its_process(
    tmp_path: Path, name: str, damage: str
) -> None:
    path = write(tmp_path, shards=SHARDS) / name
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    elif damage == "changed":  # a bit of the last byte
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_bytes(content[: len(content) // 2])
    load(path.parent)
    check_shard(path.parent, 0)
    expected = "missing" if damage == "removed" else "altered"
    with pytest.raises(ValueError, match=f"{name} is {expected}.*delete .*step-4 to start"):
        check_shard(path.parent, 1)


@pytest.mark.parametrize("name", ["save_file", "sync_to_disk", "_write_json", "sha256_of"])
def test_killed_while_it_writes_a_shard_there_is_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = checkpoint_folder(tmp_path, 4)
    start_checkpoint(folder)
    write_shard(folder, 0, SHARDS[0])
    with pytest.raises(Killed), killed_at(monkeypatch, name, 1):
        write_shard(folder, 1, SHARDS[1])
    assert newest_checkpoint(tmp_path) is None and names_of(tmp_path) == ["step-4.part"]


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_files, "FORMAT", 2)
    folder = write(tmp_path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="not of format 1"):
        read_manifest(folder)


STEPS_OF_A_WRITE = [
    ("save_file", 3),
    ("sync_to_disk", 8),
    ("_write_json", 2),
    ("sha256_of", 4),
    ("Path.rename", 1),
]


class Killed(BaseException):
    pass


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> Iterator[list[int]]:
    """End the program before the n-th call of a function; yield the number of calls made."""
    owner, _, attribute = name.rpartition(".")
    holder = getattr(checkpoint_files, owner) if owner else checkpoint_files
    original, calls = getattr(holder, attribute), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(holder, attribute, counted)
        yield calls


@pytest.mark.parametrize(("name", "count"), STEPS_OF_A_WRITE)
def test_killed_at_any_moment_of_a_write_the_one_before_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    before = write(tmp_path / "run", step=2)
    with killed_at(monkeypatch, name, -1) as calls:
        write(tmp_path / "other")
    assert calls == [count]
    for call in range(1, count + 1):
        with pytest.raises(Killed), killed_at(monkeypatch, name, call):
            write(tmp_path / "run")
        newest = newest_checkpoint(tmp_path / "run")
        assert newest is not None and equal(load(newest), STATES)
        is_published = newest.name == "step-4"  # it can be only after the rename
        assert is_published == (name == "sync_to_disk" and call > 6)
        if not is_published:
            assert newest == before
            remove_others(before)
            assert names_of(tmp_path / "run") == ["step-2"]
            continue
        checkpoint_files.shutil.rmtree(newest)


@pytest.mark.parametrize("limit", [0, 100, 5000])
def test_a_full_disk_says_so_and_leaves_the_one_before(tmp_path: Path, limit: int) -> None:
    """A limit on the size of files makes a write fail in the middle, as a full disk does."""
    before = write(tmp_path, step=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(OSError, match=r"step-4 could not be written: .*File too large"):
            write(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names_of(tmp_path) == ["step-2"]
    assert equal(load(before), STATES)


def test_the_newest_is_that_of_the_latest_step(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere") is None
    for step in (9, 10, 2):
        write(tmp_path, step=step)
    (tmp_path / "step-11.part").mkdir()
    (tmp_path / "step-x").mkdir()
    newest = newest_checkpoint(tmp_path)
    assert newest == tmp_path / "step-10"
    remove_others(newest)
    assert names_of(tmp_path) == ["step-10"]


def test_a_hostile_checkpoint_runs_nothing(tmp_path: Path) -> None:
    """A file that looks like a pickle is refused as altered, even if its hash was adjusted."""
    folder = write(tmp_path)
    path = folder / "models.safetensors"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    body = json.loads((folder / "manifest.json").read_text())
    body.pop("sha256")
    body["files"]["models.safetensors"] = checkpoint_files.sha256_of(path)
    body["sha256"] = checkpoint_files._sha256_of_json(body)
    (folder / "manifest.json").write_text(json.dumps(body))
    with pytest.raises(ValueError, match=r"models\.safetensors is altered"):
        load(folder)
    assert not (tmp_path / "ran").exists()
