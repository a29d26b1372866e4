"""Two processes that hold a model in shards go on from a kill to what they would have come to."""

import importlib.util
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stages.ppo.config import PPOSettings, RolloutSettings
from tests.stages.cut_runs import KILLED, Cut, make_configs, outcome, run_command

SHARDS = ["rank-0.json", "rank-0.safetensors", "rank-1.json", "rank-1.safetensors"]
CUT = Cut("rlhf.runs.checkpoint_files", "save_file", 2)
"""Kills the second process while it writes its shard of the second checkpoint."""
USER_ERROR = 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        *(pytest.param(name, marks=pytest.mark.long) for name in ("cpu2_zero2", "cpu2_zero3")),
        "fsdp2",
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(launcher: str, tmp_path: Path) -> None:
    """In bfloat16 under FSDP2, whose file says so. The whole run also keeps copies of the policy.
    For each the average takes the place of the weights for a moment, which changes nothing."""
    config = config_for(launcher, tmp_path)
    whole = replace(config, output_dir=str(tmp_path / "whole"), policy_every=1)
    code, printed = run(launcher, whole)
    assert code == 0, printed[-2000:]
    copy = Path(whole.output_dir, "policies/update-2/model.safetensors").read_bytes()
    assert copy == Path(whole.output_dir, "model.safetensors").read_bytes()
    checkpoints = killed_in_writing(launcher, config)
    assert sorted(path.name for path in checkpoints.glob("step-0/rank-*")) == SHARDS
    assert not any(checkpoints.glob("step-0/model*"))
    code, printed = run(launcher, config)
    assert code == 0, printed[-2000:]
    assert f"ppo: resumes after update 0 from {checkpoints / 'step-0'}" in printed
    expected, found = outcome(tmp_path / "whole"), outcome(Path(config.output_dir))
    assert {"model.safetensors", "metrics.jsonl", "results.json"} <= expected.keys()
    for name in expected.keys() | found.keys():
        assert found.get(name) == expected.get(name), name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm"])
@pytest.mark.parametrize("launcher", ["cpu2_zero2", "cpu2_zero3", "fsdp2"])
def test_the_other_stages_too(launcher: str, stage: str, tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    config = make_configs(tmp_path / "inputs", tmp_path)[stage]
    start = partial(run_command, stage, num_processes=2, launcher=launcher)
    for folder in ("whole", "killed"):
        one = replace(config, output_dir=str(tmp_path / folder))
        if folder == "killed":
            assert start(one, CUT)[0] == KILLED
            assert len([*(tmp_path / folder / "checkpoints").glob("step-*/manifest.json")]) == 1
        code, printed = start(one)
        assert code == 0, printed[-2000:]
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    for name in expected.keys() | found.keys():
        assert found.get(name) == expected.get(name), name


@pytest.mark.slow
def test_sft_under_fsdp2_takes_one_process_s_gradient_after_an_evaluation(tmp_path: Path) -> None:
    """Both evaluate before the first step. Under FSDP2 that once left the head to be dropped
    between the forward and the backward pass, and its gradient was off by a tenth of the norm."""
    (tmp_path / "inputs").mkdir()
    config = make_configs(tmp_path / "inputs", tmp_path)["sft"]
    norms = []
    for count, launcher in ((1, None), (2, "fsdp2")):
        folder = tmp_path / str(count)
        code, printed = run_command(
            "sft", replace(config, output_dir=str(folder)), num_processes=count, launcher=launcher
        )
        assert code == 0, printed[-2000:]
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        norms.append(next(row["sft/grad_norm"] for row in rows if "sft/grad_norm" in row))
    assert norms[1] == pytest.approx(norms[0], rel=0.03)  # bfloat16 moves it by 0.003


@pytest.mark.slow
def test_a_shard_that_one_process_finds_altered_stops_all(tmp_path: Path) -> None:
    config = config_for("fsdp2", tmp_path)
    shard = killed_in_writing("fsdp2", config) / "step-0" / "rank-1.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, printed = run("fsdp2", config)
    assert code == USER_ERROR
    assert f"error: {shard} is altered (sha256 " in printed, printed[-2000:]
    assert "Traceback" not in printed


def config_for(launcher: str, folder: Path) -> Any:
    """A PPO run of three updates, the first of the value model alone.

    The files of its first policy are in bfloat16, as most published ones, so FSDP2 has one process
    convert them for all.
    """
    if launcher != "fsdp2" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed, an extra, is not installed")
    (folder / "inputs").mkdir()
    config = make_configs(folder / "inputs", folder)["ppo"]
    weights = Path(config.policy.path) / "model.safetensors"
    halves = {name: weight.bfloat16() for name, weight in load_file(weights).items()}
    save_file(halves, weights, metadata={"format": "pt"})
    return replace(
        config,
        rollout=RolloutSettings(batch_size=8, max_new_tokens=4),
        ppo=PPOSettings(mini_batch_size=8, kl_target=1.0, value_warmup_updates=1),
        num_updates=3,
        checkpoint_every=1,
    )


def killed_in_writing(launcher: str, config: Any) -> Path:
    """Run until the cut; returns the folder of the checkpoints."""
    code, printed = run(launcher, config, CUT)
    assert code == KILLED, printed[-2000:]
    checkpoints = Path(config.output_dir) / "checkpoints"
    assert sorted(path.name for path in checkpoints.glob("step-*")) == ["step-0", "step-1.part"]
    return checkpoints


def run(launcher: str, config: Any, cut: Cut | None = None) -> tuple[int, str]:
    return run_command("ppo", config, cut, num_processes=2, launcher=launcher)
