"""Reads what TensorBoard and W&B got back from their own files."""

import json
import os
import socket
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf.runs.run import Run, open_run
from rlhf.runs.trackers import Tracker, is_logged_in_to_wandb
from rlhf.training.processes import start_accelerator
from stages.ppo.config import Config as PPOConfig
from stages.pretrain.config import Config as PretrainConfig
from stages.rm.config import Config as RMConfig
from stages.sft.config import Config as SFTConfig

ROWS = [{"prompt": "a|b", "response": "two\nlines", "score": 0.5}, {"prompt": "c", "kl": 1}]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings for these tests."""

    output_dir: str
    trackers: list[Tracker] = field(default_factory=list)


@pytest.fixture(autouse=True)
def accelerator() -> None:
    """Start accelerate as every stage does; its trackers log through its state."""
    start_accelerator()


def start(folder: Path, *trackers: Tracker, resume_step: int | None = None) -> Run:
    config = Settings(output_dir=str(folder), trackers=list(trackers))
    run = open_run(config, stage="sft", inputs={})
    if resume_step is not None:
        run.resume(resume_step, seconds=1.0)
    return run


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """Return (step, value) as TensorBoard shows them."""
    events = EventAccumulator(str(folder / "trackers" / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_holds_the_metrics_and_samples(tmp_path: Path) -> None:
    run = start(tmp_path, "tensorboard")
    run.log(1, {"sft/loss": 2.5, "sft/note": "nan"})
    run.log(2, {"sft/loss": 1.25})
    run.samples(ROWS, step=2)
    run.finish({})
    assert scalars(tmp_path, "sft/loss") == [(1, 2.5), (2, 1.25)]
    events = EventAccumulator(str(tmp_path / "trackers" / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["sft/loss"]
    (table,) = events.Tensors("samples/text_summary")
    assert table.step == 2
    assert table.tensor_proto.string_val[0].decode().splitlines() == [
        "| step | prompt | response | score | kl |",
        "| --- | --- | --- | --- | --- |",
        "| 2 | a\\|b | two<br>lines | 0.5 |  |",
        "| 2 | c |  |  | 1 |",
    ]


def test_a_run_that_goes_on_shows_no_step_twice(tmp_path: Path) -> None:
    run = start(tmp_path, "tensorboard")
    for step in (1, 2, 3):
        run.log(step, {"sft/loss": step})
    start(tmp_path, "tensorboard", resume_step=1).log(2, {"sft/loss": 7.0})
    assert scalars(tmp_path, "sft/loss") == [(1, 1.0), (2, 7.0)]
    start(tmp_path, "tensorboard").log(1, {"sft/loss": 4.0})
    assert scalars(tmp_path, "sft/loss") == [(1, 4.0)]


def test_no_tracker_runs_unless_asked_for(tmp_path: Path) -> None:
    for config_class in (PretrainConfig, SFTConfig, RMConfig, PPOConfig):
        fields = {one.name: one for one in config_class.__dataclass_fields__.values()}
        factory = fields["trackers"].default_factory
        assert factory is not MISSING and factory() == []
    start(tmp_path).log(1, {"sft/loss": 1.0})
    assert not (tmp_path / "trackers").exists()


def test_only_the_first_process_tracks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "1")
    start(tmp_path, "tensorboard").log(1, {"sft/loss": 1.0})
    assert not (tmp_path / "trackers").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, name: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        monkeypatch.delitem(sys.modules, module)
    finders = [finder for finder in sys.meta_path if not hasattr(finder, "invalidate_caches")]
    monkeypatch.setattr(sys, "meta_path", finders)  # without the one that searches the disk
    with pytest.raises(ValueError, match=f"`pip install {name}`"):
        start(tmp_path / "run", name)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "line", "logged_in"),
    [
        ("a" * 40, "", True),
        ("", "machine api.wandb.ai login user password a", True),
        ("", "machine example.org login user password a", False),
        ("", "machine", False),
        ("", None, False),
    ],
)
def test_a_login_to_wandb_is_found(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    line: str | None,
    logged_in: bool,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    if line is not None:
        (tmp_path / "netrc").write_text(line)
    assert is_logged_in_to_wandb() is logged_in


def test_trackio_holds_the_metrics_and_samples_below_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed; the extra [trackio] has it")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/elses-space")
    run = start(tmp_path / "run", "trackio")
    run.log(1, {"sft/loss": 2.5, "sft/note": "nan"})
    run.log(2, {"sft/loss": 1.25})
    run.samples(ROWS, step=2)
    run.finish({})
    (database,) = (tmp_path / "run" / "trackers" / "trackio").glob("*.db")
    with closing(sqlite3.connect(database)) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("select metrics from metrics")]
    assert [row["sft/loss"] for row in rows if "sft/loss" in row] == [2.5, 1.25]
    (table,) = [row["samples"] for row in rows if "samples" in row]
    assert table["_type"] == "trackio.table"
    assert "TRACKIO_SPACE_ID" not in os.environ


def test_settings_are_read_without_importing_a_tracker() -> None:
    program = "import sys, stages.ppo.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_wandb_without_a_login_writes_below_the_run_and_calls_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[Any] = []
    connect = socket.socket.connect

    def note(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("localhost", "127.0.0.1", "::1"):
            called.append(address)
            raise OSError("no network here")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", note)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    run = start(tmp_path / "run", "wandb")
    run.log(1, {"sft/loss": 2.5})
    run.samples(ROWS, step=1)
    run.finish({"accuracy": 1})
    assert called == []
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    (folder,) = (tmp_path / "run" / "trackers" / "wandb" / "wandb").glob("offline-run-*")
    (record,) = folder.glob("*.wandb")
    for _ in range(100):  # W&B's own process writes the last of it when it ends
        if b"sft/loss" in record.read_bytes():
            break
        time.sleep(0.1)
    assert b"sft/loss" in record.read_bytes()
    (table,) = folder.rglob("*.table.json")
    assert json.loads(table.read_text())["data"][0] == ["1", "a|b", "two\nlines", "0.5", ""]
