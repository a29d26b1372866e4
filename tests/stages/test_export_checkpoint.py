"""A checkpoint holds the policy of a run that ended early, for users who do not want to resume it.

These runs end with an error. Real kills, with what is left of them, are in test_resume.py.
"""

from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest

from stages.ppo.train import train
from stages.rm.train import train as train_reward_model
from tests.stages.cut_runs import make_configs
from tools.export.config import Config
from tools.export.export import export


class CutError(Exception):
    """Ends a run before it writes its model."""


def cut_before(monkeypatch: pytest.MonkeyPatch, writing: str) -> None:
    """Let runs end with `CutError` when they call this function."""

    def end(*_: object, **__: object) -> NoReturn:
        raise CutError

    monkeypatch.setattr(writing, end)


def last_checkpoint(folder: Path) -> str:
    [found] = (folder / "checkpoints").iterdir()
    return str(found)


def test_a_checkpoint_gives_the_policy_of_a_run_that_ends_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have a constant learning rate, and end with the average of the weights."""
    (tmp_path / "inputs").mkdir()
    config = make_configs(tmp_path / "inputs", tmp_path)["ppo"]
    config = replace(config, checkpoint_every=1, optim=replace(config.optim, schedule="constant"))
    assert config.ema_decay is not None
    with monkeypatch.context() as patch, pytest.raises(CutError):
        cut_before(patch, "stages.ppo.stopping.save_policy")
        train(config)
    checkpoint = last_checkpoint(Path(config.output_dir))
    export(Config(folder=checkpoint, output_dir=str(tmp_path / "early")))
    num_updates = int(checkpoint.rpartition("-")[2]) + 1
    train(replace(config, num_updates=num_updates, output_dir=str(tmp_path / "shorter")))
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        expected = (tmp_path / "shorter" / name).read_bytes()
        assert (tmp_path / "early" / name).read_bytes() == expected


def test_copies_along_the_run_are_the_policies_of_runs_that_end_there(tmp_path: Path) -> None:
    """A copy holds the average of the weights; the run goes on with its own weights."""
    (tmp_path / "inputs").mkdir()
    config = make_configs(tmp_path / "inputs", tmp_path)["ppo"]
    config = replace(config, optim=replace(config.optim, schedule="constant"))
    assert config.ema_decay is not None and config.num_updates % 2 == 0
    copied = replace(config, policy_every=2, output_dir=str(tmp_path / "copied"))
    train(copied)
    policies = tmp_path / "copied/policies"
    numbers = range(1, config.num_updates, 2)
    assert {one.name for one in policies.iterdir()} == {f"update-{number}" for number in numbers}
    for number in numbers:
        alone = tmp_path / f"alone{number}"
        train(replace(config, num_updates=number + 1, output_dir=str(alone)))
        for name in ("model.safetensors", "tokenizer.json", "config.json"):
            found = policies / f"update-{number}" / name
            assert found.read_bytes() == (alone / name).read_bytes()


def test_a_checkpoint_of_another_stage_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "inputs").mkdir()
    config = make_configs(tmp_path / "inputs", tmp_path)["rm"]
    cut_before(monkeypatch, "stages.rm.train.save_scalar")
    with pytest.raises(CutError):
        train_reward_model(config)
    checkpoint = last_checkpoint(Path(config.output_dir))
    with pytest.raises(ValueError, match=r"is a checkpoint of rm on 1 processes; only the whole"):
        export(Config(folder=checkpoint, output_dir=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
