"""Tests when checkpoints are written, and what a run says about one that it finds."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from rlhf.runs.checkpoints import Checkpoints
from rlhf.runs.run import open_run
from rlhf.runs.stateful import Fields


@dataclass(frozen=True, kw_only=True)
class Settings:
    output_dir: str
    checkpoint_every: int | None = 2
    trackers: tuple[str, ...] = ()
    seed: int = 0
    overwrite: bool = False


@dataclass
class OneProcess:
    """Has what checkpoints use of an Accelerator."""

    distributed_type: DistributedType = DistributedType.NO
    mixed_precision: str = "no"
    num_processes: int = 1
    process_index: int = 0
    is_main_process: bool = True
    printed: list[str] = field(default_factory=list)
    zero: dict[str, Any] = field(default_factory=dict)
    """DeepSpeed's settings of ZeRO; empty without DeepSpeed."""

    @property
    def state(self) -> Any:
        stage = self.zero.get("stage")
        settings = {"zero_optimization": self.zero}
        plugin = SimpleNamespace(zero_stage=stage, deepspeed_config=settings)
        return SimpleNamespace(deepspeed_plugin=plugin)

    def print(self, text: str, flush: bool = True) -> None:
        self.printed.append(text)

    def wait_for_everyone(self) -> None:
        pass


@dataclass
class Counter:
    count: int = 0
    own: int = 0
    """A number that differs between processes."""


def under_zero(stage: int, **settings: Any) -> OneProcess:
    return OneProcess(DistributedType.DEEPSPEED, zero={"stage": stage, **settings})


def start(folder: Path, accelerator: Any = None, **changes: Any) -> tuple[Checkpoints, Counter]:
    settings = Settings(**{"output_dir": str(folder), **changes})
    run = open_run(settings, stage="ppo", inputs={})
    accelerator = accelerator or OneProcess()
    checkpoints = Checkpoints(run, accelerator, settings.checkpoint_every)
    counter = Counter()
    own = {"own": Fields(counter, "own")}
    checkpoints.restore({"counter": Fields(counter, "count")}, own)
    return checkpoints, counter


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*"))


def test_every_so_many_steps_one_is_written_and_the_last_is_kept(tmp_path: Path) -> None:
    checkpoints, counter = start(tmp_path)
    saved = []
    for step in range(1, 6):
        counter.count = 10 * step
        saved.append((checkpoints.end_step(step), names(tmp_path)))
    assert saved == [
        (False, []),
        (True, ["step-2"]),
        (False, ["step-2"]),
        (True, ["step-4"]),
        (False, ["step-4"]),
    ]
    resumed, counter = start(tmp_path)
    assert (resumed.step, counter.count) == (4, 40)


def test_none_is_written_where_none_is_asked_for(tmp_path: Path) -> None:
    checkpoints, _ = start(tmp_path, checkpoint_every=None)
    assert not checkpoints.are_written and not checkpoints.end_step(1)


SPLITTING = {
    "ZeRO-2": under_zero(2),
    "ZeRO-3": under_zero(3, offload_optimizer={"device": "cpu"}),
    "FSDP2": OneProcess(DistributedType.FSDP),
}


@pytest.mark.parametrize("kind", SPLITTING)
def test_where_the_model_is_split_every_process_writes_its_own(tmp_path: Path, kind: str) -> None:
    checkpoints, counter = start(tmp_path, SPLITTING[kind], checkpoint_every=1)
    counter.count, counter.own = 5, 6
    assert checkpoints.end_step(7)
    folder = tmp_path / "checkpoints" / "step-7"
    assert json.loads((folder / "rank-0.json").read_text()) == {"rank-0": {"own": {"own": 6}}}
    assert json.loads((folder / "state.json").read_text()) == {"counter": {"count": 5}}
    resumed, counter = start(tmp_path, SPLITTING[kind])
    assert (resumed.step, counter.count, counter.own) == (7, 5, 6)
    (folder / "rank-0.json").write_text("{}")
    with pytest.raises(ValueError, match=r"rank-0\.json is altered .* or delete .*step-7 to start"):
        start(tmp_path, SPLITTING[kind])


UNSAVED = {
    "ZeRO-1 keeps other optimizers": under_zero(1),
    "offload_optimizer keeps weights or moments in files": under_zero(
        3, offload_optimizer={"device": "nvme"}
    ),
    "offload_optimizer with a ratio": under_zero(3, offload_optimizer={"ratio": 0.5}),
    "FSDP2 in fp16 changes a loss scale": OneProcess(DistributedType.FSDP, "fp16"),
}


@pytest.mark.parametrize("reason", UNSAVED)
def test_what_a_checkpoint_cannot_hold_is_said_at_the_start(tmp_path: Path, reason: str) -> None:
    checkpoints, _ = start(tmp_path, accelerator := UNSAVED[reason], checkpoint_every=1)
    assert not checkpoints.are_written and not checkpoints.end_step(1)
    assert not (tmp_path / "checkpoints").exists()
    (line,) = accelerator.printed
    assert line.startswith("ppo: no checkpoints are written") and reason in line


def test_another_split_or_number_of_processes_is_refused(tmp_path: Path) -> None:
    checkpoints, _ = start(tmp_path, OneProcess(DistributedType.FSDP), checkpoint_every=1)
    checkpoints.end_step(7)
    with pytest.raises(ValueError, match="model was split by FSDP2 and is by ZeRO-3; start it as"):
        start(tmp_path, under_zero(3))
    with pytest.raises(ValueError, match="model was split by FSDP2 and is by nothing; start it as"):
        start(tmp_path)
    with pytest.raises(ValueError, match="and is by ZeRO-3 with offload_optimizer; start it as"):
        start(tmp_path, under_zero(3, offload_optimizer={"device": "cpu"}))
    four = OneProcess(DistributedType.FSDP, num_processes=4)
    expected = r"number of processes was 1 and is 4, .* its shard of the model; start it as before"
    with pytest.raises(ValueError, match=expected):
        start(tmp_path, four)


def test_settings_that_change_nothing_may_change_and_others_may_not(tmp_path: Path) -> None:
    checkpoints, _ = start(tmp_path / "here", checkpoint_every=1)
    checkpoints.end_step(7)
    (tmp_path / "here").rename(tmp_path / "there")
    moved, _ = start(tmp_path / "there", checkpoint_every=5, trackers=("tensorboard",))
    assert moved.step == 7
    with pytest.raises(ValueError, match=r"step-7 is of another run: seed was 0 and is 1; start"):
        start(tmp_path / "there", seed=1)


def test_a_checkpoint_of_another_run_is_passed_over_on_request_only(tmp_path: Path) -> None:
    checkpoints, _ = start(tmp_path, checkpoint_every=1)
    checkpoints.end_step(7)
    with pytest.raises(ValueError, match="or give --overwrite, or another output_dir"):
        start(tmp_path, seed=1)
    assert names(tmp_path) == ["step-7"]
    resumed, _ = start(tmp_path, overwrite=True)
    assert resumed.step == 7, "of the same run"
    accelerator = OneProcess()
    anew, _ = start(tmp_path, accelerator, seed=1, overwrite=True, checkpoint_every=1)
    assert anew.step is None and "does not go on from" in accelerator.printed[0]
    assert names(tmp_path) == ["step-7"], "nothing is written yet"
    anew.end_step(1)
    assert names(tmp_path) == ["step-1"]


def test_another_precision_is_another_run(tmp_path: Path) -> None:
    checkpoints, _ = start(tmp_path, checkpoint_every=1)
    checkpoints.end_step(7)
    with pytest.raises(ValueError, match="launcher's mixed_precision was no and is bf16; start"):
        start(tmp_path, OneProcess(mixed_precision="bf16"))


def test_other_code_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints, _ = start(tmp_path, checkpoint_every=1)
    checkpoints.end_step(7)
    monkeypatch.setattr("rlhf.runs.run.commit", lambda: "abc")
    accelerator = OneProcess()
    start(tmp_path, accelerator)
    assert "and this is abc; the rest of the run may differ" in accelerator.printed[0]


def test_a_failed_write_says_where_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints, _ = start(tmp_path, checkpoint_every=1)
    checkpoints.end_step(1)

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rlhf.runs.checkpoint_files.save_file", full)
    monkeypatch.setattr("rlhf.runs.checkpoint_files._write_json", full)
    expected = r"step-2 could not be written: .*No space left.*which goes on from .*step-1$"
    with pytest.raises(OSError, match=expected):
        checkpoints.end_step(2)
    assert names(tmp_path) == ["step-1"]
