"""Tests what a second process says of files that it does not see; the first one is pretended."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.runs import shared_files
from rlhf.runs.folder import LOCK, acquire_folder
from rlhf.runs.shared_files import check_inputs, check_output

HOLDER = '{"pid": 7, "host": "first"}'


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the second process; the first one has HOLDER in its lock file and misses nothing."""

    def broadcast(texts: list[str]) -> None:
        texts[0] = HOLDER

    def gather(work: Callable[[], Any], kind: type[Exception]) -> list[Any]:
        return [None, work()]

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(shared_files, "broadcast_object_list", broadcast)
    monkeypatch.setattr(shared_files, "gather_from_all", gather)
    monkeypatch.setattr(shared_files, "SEEN_WITHIN", 0.0)


@pytest.mark.usefixtures("second_of_two")
@pytest.mark.parametrize("text", [None, '{"pid": 7, "host": "second"}'])
def test_output_folder_of_its_own_is_refused(text: str | None, tmp_path: Path) -> None:
    """It is not there, or another program of this machine holds it."""
    if text is not None:
        (tmp_path / LOCK).write_text(text)
    told = f"process 1 of 2, on .*: {tmp_path} is not the output_dir .* file system that they share"
    with pytest.raises(ValueError, match=told):
        check_output(tmp_path, None)


@pytest.mark.usefixtures("second_of_two")
def test_shared_output_folder_may_show_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(_: float) -> None:
        (tmp_path / LOCK).write_text(HOLDER)

    monkeypatch.setattr(shared_files, "SEEN_WITHIN", 60.0)
    monkeypatch.setattr(shared_files.time, "sleep", show)
    check_output(tmp_path, None)


@pytest.mark.usefixtures("second_of_two")
def test_input_that_one_machine_lacks_is_named(tmp_path: Path) -> None:
    path = str(tmp_path / "rows.jsonl")
    told = f"process 1 of 2, on .*: sft reads rows from {path}, which does not exist"
    with pytest.raises(FileNotFoundError, match=told):
        check_inputs("sft", {"rows": path})


def test_holder_is_the_text_of_the_lock_file(tmp_path: Path) -> None:
    folder = acquire_folder(tmp_path / "run", program="sft", files=(), overwrite=False)
    held = folder.holder
    assert held == (tmp_path / "run" / LOCK).read_text()
    assert json.loads(held)["pid"] == os.getpid()
    folder.release()
