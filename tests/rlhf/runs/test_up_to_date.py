"""A program runs again exactly when its settings, its inputs or its code changed."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlhf.runs import code, files
from rlhf.runs.folder import MARK, RESULTS, folders_released, writing
from rlhf.runs.run import open_run
from rlhf.runs.settings import FolderSettings

WORDS = "sft: up to date: {} (made 2"


@dataclass(frozen=True, kw_only=True)
class Settings(FolderSettings):
    """Settings for these tests."""

    output_dir: str
    seed: int = 0
    gold: str = "none"
    checkpoint_every: int = 5


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.runs.run.commit", lambda: "abc")
    monkeypatch.setattr("rlhf.runs.code.hash_of_library", lambda: "library")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "a"}')
    age(path)
    return path


def age(path: Path) -> None:
    """Move the time of a file back, as if it had been written long ago."""
    os.utime(path, (1_000_000_000, 1_000_000_000))


@pytest.fixture
def stage(tmp_path: Path, data: Path) -> Callable[..., bool]:
    """Run a stage with these settings; return whether it ran."""

    def run(is_cut_off: bool = False, **settings: Any) -> bool:
        ran = []

        @folders_released()
        def train() -> None:
            config = Settings(output_dir=str(tmp_path / "run"), **settings)
            opened = open_run(config, stage="sft", inputs={"data": data}, files=("model.bin",))
            ran.append(True)
            opened.log(1, {"sft/loss": 1.0})
            if is_cut_off:
                (opened.checkpoints / "step-1").mkdir(parents=True)
                raise KeyboardInterrupt
            (opened.dir / "model.bin").write_bytes(b"weights")
            opened.finish({})

        train()
        return bool(ran)

    return run


def test_the_same_run_is_made_once(
    stage: Callable[..., bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert stage()
    capsys.readouterr()
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert not stage()
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(WORDS.format(tmp_path / "run")) and line.endswith(
        "--force runs it anyway"
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    assert not stage(overwrite=True)
    assert not stage(checkpoint_every=7), "changes no result"
    assert stage(force=True)
    assert "force" not in (tmp_path / "run" / "config.yaml").read_text()
    assert not stage()


def test_other_settings_run_and_say_what_they_replace(
    stage: Callable[..., bool], capsys: pytest.CaptureFixture[str]
) -> None:
    stage()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        stage(seed=1)
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        stage(seed=1, force=True)
    capsys.readouterr()
    assert stage(seed=1, overwrite=True)
    assert "sft: replaces the run in" in capsys.readouterr().out
    assert not stage(seed=1)


def test_a_run_that_was_cut_off_or_lost_a_file_runs(
    stage: Callable[..., bool], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage()
    (tmp_path / "run" / "model.bin").unlink()
    assert stage()
    assert f"replaces the run in {tmp_path / 'run'}: model.bin is gone" in capsys.readouterr().out
    (tmp_path / "run" / RESULTS).unlink()
    assert stage()
    assert "replaces" not in capsys.readouterr().out


def test_other_inputs_run(stage: Callable[..., bool], data: Path) -> None:
    stage()
    data.touch()
    assert not stage(), "the content is the same"
    data.write_text('{"text": "b"}')
    with pytest.raises(ValueError, match="what data names was other data"):
        stage()
    assert stage(overwrite=True)


def test_other_code_runs_and_other_comments_do_not(
    stage: Callable[..., bool],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = tmp_path / "my_gold.py"
    module.write_text("def make():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert stage(gold="my_gold:make")
    module.write_text('"""Gold."""\n\ndef make():  # one\n    """Make."""\n\n    return 1\n')
    assert not stage(gold="my_gold:make")
    module.write_text("def make():\n    return 2\n")
    assert stage(gold="my_gold:make")
    monkeypatch.setattr(code, "hash_of_library", lambda: "another library")
    capsys.readouterr()
    assert stage(gold="my_gold:make")
    assert "the code has changed since" in capsys.readouterr().out


def test_a_run_that_went_on_under_other_code_is_not_current(
    stage: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        stage(is_cut_off=True)
    monkeypatch.setattr(code, "hash_of_library", lambda: "another library")
    assert stage(), "it goes on"
    assert stage(), "and is made anew"
    assert not stage()


def test_the_code_is_the_library_and_the_programs_own_folder(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "gold": "none",
        "judges": {"a": "rlhf.runs.code:code_of", "b": "x:y"},
    }
    config = Settings(output_dir="x")
    found = code.code_of(config, settings)
    assert set(found) == {"program", "judges.a"}
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "x.py").write_text("x = 1\n")
    assert code._hash_of_folder(first) == code._hash_of_folder(second)
    (second / "inner" / "x.py").rename(second / "x.py")
    assert code._hash_of_folder(first) != code._hash_of_folder(second)


def test_a_large_input_is_read_again_only_if_its_size_or_time_changed(
    stage: Callable[..., bool], data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stage()
    marked = json.loads((tmp_path / "run" / MARK).read_text())["hashed"]
    assert marked[str(data)][:2] == [13, 1_000_000_000 * 10**9]
    read: list[str] = []
    sha256_of = files.sha256_of

    def noted(path: Path) -> str:
        read.append(path.name)
        return sha256_of(path)

    monkeypatch.setattr(files, "sha256_of", noted)
    assert not stage()
    assert read == []
    assert stage(force=True)
    assert read == ["data.jsonl"], "the record of a new run rests on what was read"
    data.touch()
    assert not stage()
    assert read == ["data.jsonl"] * 2


def test_a_file_that_was_just_written_is_not_known_by_its_time(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("a")
    hashes = files.FileHashes()
    first = hashes.of(path)
    assert hashes.recorded == {}
    path.write_text("b")
    assert files.FileHashes(hashes.recorded).of(path) != first


def test_programs_that_are_no_runs_are_made_once_too(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    @folders_released()
    def make(version: str = "1", force: bool = False) -> None:
        with writing(
            tmp_path / "out",
            program="data.x",
            files=["x.txt", RESULTS],
            settings={},
            inputs={"folder": data.parent / "in"},
            code={"program": version},
            overwrite=False,
            force=force,
        ) as folder:
            folder.begin()
            made.append(version)
            (folder.path / RESULTS).write_text("{}")
            folder.finish()

    (tmp_path / "in" / "below").mkdir(parents=True)
    (tmp_path / "in" / "below" / "x.txt").write_text("a")
    make()
    make()
    assert made == ["1"]
    assert "data.x: up to date" in capsys.readouterr().out
    make(force=True)
    make("2")
    assert made == ["1", "1", "2"]
    (tmp_path / "in" / "below" / "x.txt").write_text("b")
    with pytest.raises(ValueError, match="what folder names was other data"):
        make("2")
