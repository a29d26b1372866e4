"""Tests who owns an output folder: what is refused, and what overwriting leaves alone.

A refusal changes nothing.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf.runs.folder import LOCK, MARK, acquire_folder, folders_released, locked_file, writing
from rlhf.runs.run import Run, open_run
from rlhf.runs.settings import FolderSettings

ROOT = Path(__file__).parents[3]
FILES = ("model.safetensors", "shards-*.bin")


@dataclass(frozen=True, kw_only=True)
class Settings(FolderSettings):
    """Settings for these tests."""

    output_dir: str
    seed: int = 0
    rate: float = float("inf")
    source: str = "a/b"


@pytest.fixture(autouse=True)
def given_back(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(
        "rlhf.runs.run.commit", lambda: "abc"
    )  # git takes longer than all else here
    with folders_released():
        yield


def start(folder: Path, stage: str = "sft", inputs: Any = (), **settings: Any) -> Run:
    config = Settings(output_dir=str(folder), **settings)
    shared = stage == "evaluate"
    return open_run(config, stage=stage, inputs=dict(inputs), files=FILES, is_shared=shared)


def finish(folder: Path, stage: str = "sft", **settings: Any) -> None:
    run = start(folder, stage, **settings)
    run.log(1, {"sft/loss": 1.0})
    (run.dir / "model.safetensors").write_bytes(b"of seed %d" % settings.get("seed", 0))
    run.finish({})


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Return every file and folder with its bytes."""
    return {
        path.relative_to(folder).as_posix(): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def refused(
    folder: Path, words: str, stage: str = "sft", inputs: Any = (), **settings: Any
) -> None:
    """Check that a run is refused with these words, and that every byte in the folder stays."""
    before = without_locks(folder.parent)
    with pytest.raises(ValueError, match=words), folders_released():
        start(folder, stage, inputs, **settings)
    assert without_locks(folder.parent) == before


def without_locks(folder: Path) -> dict[str, bytes | None]:
    """Leave out the locks, which name the second in which they were taken."""
    return {name: data for name, data in snapshot(folder).items() if Path(name).name != LOCK}


def mark_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MARK).read_text(encoding="utf-8"))


def test_the_mark_comes_first_and_names_what_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    run = start(folder)
    assert sorted(path.name for path in folder.iterdir()) == [MARK, LOCK]
    assert mark_of(folder)["files"] == []
    run.log(1, {"sft/loss": 1.0})
    assert {"model.safetensors", "checkpoints/step-*", "results.json"} <= set(
        mark_of(folder)["files"]
    )
    (folder / "shards-3.bin").touch()
    (folder / "notes.txt").touch()
    run.finish({})
    assert mark_of(folder)["files"] == [
        *("config.yaml", "lineage.json", "metrics.jsonl", "results.json", "shards-3.bin")
    ]
    assert not (folder / LOCK).exists()
    assert "overwrite" not in (folder / "config.yaml").read_text()


def test_a_run_that_does_not_begin_leaves_nothing(tmp_path: Path) -> None:
    with folders_released():
        start(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(KeyError), folders_released():
        start(tmp_path / "empty")
        raise KeyError
    assert list((tmp_path / "empty").iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["samples.jsonl", "config.yaml", "notes.txt", ".hidden", "checkpoints/base/model.safetensors"],
)
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_text("years of work")
    first = Path(name).parts[0]
    for overwrite in (False, True):
        refused(tmp_path / "mine", rf"holds {first}, which this program", overwrite=overwrite)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=r"file is a file; give another folder"):
            start(folder)


@pytest.mark.parametrize("read", [".", "checkpoints/base", "data.jsonl", "deep/below/x.jsonl"])
@pytest.mark.parametrize("stage", ["sft", "evaluate"])
def test_inputs_in_the_folder_are_refused(tmp_path: Path, read: str, stage: str) -> None:
    folder = tmp_path / "mine"
    path = folder / read
    (path if path.suffix == "" else path.parent).mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.write_text("{}")
    if stage == "evaluate" and "deep" in read:
        start(folder, stage, {"prompts": path})  # it writes no file there
        return
    (tmp_path / "link").symlink_to(path)
    for source in (path, tmp_path / "link"):
        refused(folder, r"prompts", stage, {"prompts": source}, overwrite=True)
    refused(tmp_path / "other" / ".." / "mine", r"prompts", stage, {"prompts": path})


def test_links_in_and_to_the_folder_count_as_inputs_in_it(tmp_path: Path) -> None:
    finish(tmp_path / "run")
    collected = tmp_path / "collected"
    collected.mkdir()
    (collected / "x.jsonl").symlink_to(tmp_path / "run" / "metrics.jsonl")
    refused(tmp_path / "run", "data is read from .*collected", inputs={"data": collected}, seed=1)
    (tmp_path / "elsewhere").write_text("{}")
    (tmp_path / "run" / "x.jsonl").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "run", "lies in", inputs={"data": tmp_path / "run" / "x.jsonl"})


def test_the_base_of_an_adapter_counts_as_read(tmp_path: Path) -> None:
    finish(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "base.json").write_text(json.dumps({"path": str(tmp_path / "base"), "sha256": "0"}))
    words = "also what the base of model is read from"
    refused(tmp_path / "base", words, inputs={"model": adapter}, overwrite=True)


def test_the_run_of_other_settings_is_replaced_on_request_only(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(folder)
    (folder / "notes.txt").write_text("mine")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "mine").write_text("mine")
    (folder / "shards-9.bin").write_text("mine")
    refused(folder, "holds shards-9.bin, which the run of sft in it did not", overwrite=True)
    (folder / "shards-9.bin").rename(folder / "kept.bin")
    refused(folder, "the finished run of other settings: seed was 0 and is 1; give", seed=1)
    run = start(folder, seed=1, overwrite=True)
    assert (folder / "results.json").exists()
    run.log(1, {"sft/loss": 2.0})
    assert not (folder / "model.safetensors").exists(), "of the other run"
    run.finish({})
    kept = {name: data for name, data in snapshot(folder).items() if data == b"mine"}
    assert set(kept) == {"notes.txt", "checkpoints/mine", "kept.bin"}
    assert mark_of(folder)["settings"]["seed"] == 1


def test_the_same_run_may_be_done_anew(tmp_path: Path) -> None:
    finish(tmp_path / "run", source="runs/sft")
    finish(tmp_path / "run", source="runs/./sft/", force=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    finish(tmp_path / "moved", source="runs/sft", force=True)


def test_other_inputs_are_another_run(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}')
    run = start(tmp_path / "run", inputs={"data": data})
    run.finish({})
    data.write_text('{"text": "b"}')
    refused(tmp_path / "run", "what data names was other data", inputs={"data": data})
    refused(tmp_path / "run", "what more names was other", inputs={"data": data, "more": "a/b"})


def test_an_unfinished_run_of_other_settings_is_not_lost(tmp_path: Path) -> None:
    start(tmp_path / "run").log(1, {"sft/loss": 1.0})
    refused(tmp_path / "run", "the unfinished run of other settings: seed was 0 and is 1", seed=1)
    start(tmp_path / "run").log(1, {"sft/loss": 1.0})
    start(tmp_path / "run", seed=1, overwrite=True).log(1, {"sft/loss": 1.0})


def test_the_run_of_another_stage_is_replaced_on_request_only(tmp_path: Path) -> None:
    finish(tmp_path / "run", "rm")
    refused(tmp_path / "run", "holds a run of rm, and this is sft; give another output_dir, or --o")
    start(tmp_path / "run", overwrite=True).log(1, {"sft/loss": 1.0})
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_folders_of_earlier_versions_are_known(tmp_path: Path) -> None:
    finish(tmp_path / "run", seed=3)
    (tmp_path / "run" / MARK).unlink()
    refused(tmp_path / "run", "finished run of other settings: seed was 3 and is 0")
    refused(tmp_path / "run", "which this program did not write", "rm", overwrite=True)
    finish(tmp_path / "run", seed=3)
    assert mark_of(tmp_path / "run")["settings"]["seed"] == 3
    (tmp_path / "run" / MARK).unlink()
    (tmp_path / "run" / "lineage.json").write_text('{"stage": "sft"}')
    refused(tmp_path / "run", "which this program did not write", seed=3)


@pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', '{"format": 1, "files": []}'])
def test_a_mark_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    finish(tmp_path / "run")
    (tmp_path / "run" / MARK).write_text(text)
    refused(tmp_path / "run", "cannot be read .*; give another output_dir", overwrite=True)


def test_a_shared_folder_holds_other_runs_beside(tmp_path: Path) -> None:
    finish(tmp_path / "all" / "sft")
    (tmp_path / "all" / "README").write_text("mine")
    inputs = {"policy": tmp_path / "all" / "sft"}
    before = snapshot(tmp_path / "all")
    start(tmp_path / "all", "evaluate", inputs).finish({})
    start(tmp_path / "all", "evaluate", inputs, force=True).finish({})
    after = snapshot(tmp_path / "all")
    assert {name: after[name] for name in before} == before
    refused(tmp_path / "all", "holds a run of evaluate, and this is sft")
    (tmp_path / "all" / "model.safetensors").write_text("mine")
    refused(tmp_path / "all", "holds model.safetensors, which", "evaluate", overwrite=True)


@pytest.mark.parametrize("name", ["samples.jsonl", "results.json", "config.yaml", "shards-1.bin"])
def test_files_in_the_way_of_a_shared_folder_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "all").mkdir()
    (tmp_path / "all" / name).write_text("mine")
    refused(tmp_path / "all", f"holds {name}, which this program", "evaluate", overwrite=True)


PROGRAM = """
    import sys, time
    from rlhf.runs.folder import acquire_folder
    folder = acquire_folder(sys.argv[1], program="sft", files=["x.txt"], overwrite=False)
    print("taken", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_in_use_until_its_process_is_gone(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "taken\n"
        who = f"in use: process {process.pid} on {socket.gethostname()}, since 20"
        refused(tmp_path / "run", who)
        refused(tmp_path / "run", who, overwrite=True)
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / "run" / LOCK).exists()
    finish(tmp_path / "run")


HOLDER = """
    import sys, time
    from rlhf.runs.folder import locked_file
    with locked_file(sys.argv[1]):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_file_is_in_use_until_its_process_is_gone(tmp_path: Path) -> None:
    output = tmp_path / "new" / "out.jsonl"
    command = [sys.executable, "-c", textwrap.dedent(HOLDER), str(output)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        who = rf"output .*out\.jsonl is in use: process {process.pid} on .*give another output$"
        with pytest.raises(ValueError, match=who), locked_file(output):
            raise AssertionError("was held twice")
        with locked_file(output.with_name("other.jsonl")):
            pass  # other files of the folder are free
        process.send_signal(signal.SIGKILL)
    with locked_file(output):
        assert [one.name for one in output.parent.iterdir()] == [".out.jsonl.lock"]
    assert not list(output.parent.iterdir())


def test_a_file_that_is_held_but_not_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked_file(tmp_path / "a" / "b" / "out.jsonl"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_where_there_are_no_locks_the_number_of_the_process_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf.runs.folder.fcntl", None)
    finish(tmp_path / "run")
    lock = tmp_path / "run" / LOCK
    holder = {"pid": os.getppid(), "host": socket.gethostname(), "since": "now"}
    lock.write_text(json.dumps(holder))
    refused(tmp_path / "run", f"process {os.getppid()} on")
    lock.write_text(json.dumps({**holder, "host": "elsewhere"}))
    refused(tmp_path / "run", f"on elsewhere.*if that process is gone, delete .*{LOCK}")
    for text in (json.dumps({**holder, "pid": 2**22 + 1}), "", "{"):
        lock.write_text(text)
        finish(tmp_path / "run", force=True)


def test_only_the_first_process_takes_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    run = start(tmp_path / "run", seed=5)
    run.log(1, {"sft/loss": 1.0})
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_programs_that_are_no_runs_have_the_same_rules(tmp_path: Path) -> None:
    def write(seed: int, overwrite: bool = False) -> None:
        with writing(
            tmp_path / "data",
            program="data.x",
            files=["x.txt"],
            settings={"seed": seed},
            code={},
            overwrite=overwrite,
            force=False,
        ) as folder:
            folder.begin()
            (folder.path / "x.txt").write_text(str(seed))
            folder.finish()

    write(0)
    (tmp_path / "data" / "mine").touch()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        write(1)
    write(1, overwrite=True)
    assert (tmp_path / "data" / "x.txt").read_text() == "1" and (tmp_path / "data/mine").exists()
    with pytest.raises(ValueError, match="holds a run of data"):
        acquire_folder(tmp_path / "data", program="y", files=[], overwrite=False)
