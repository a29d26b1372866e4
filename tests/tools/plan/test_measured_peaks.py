"""Compares the plan's peaks with the memory of real runs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.models.settings import LoraSettings
from rlhf.runs.settings import settings_in_use
from stages.ppo.config import Config
from stages.rm.config import Config as RMConfig
from stages.sft.config import Config as SFTConfig
from tests.tools.plan.inputs import (
    LARGE,
    SMALL,
    TAUGHT,
    TEXT,
    fine_tuning_config,
    ranking_config,
    run_config,
    write_inputs,
)
from tools.plan.launch import Launch
from tools.plan.make import make_plan

ROOT = Path(__file__).parents[3]

TOLERANCE = 0.15

StageConfig = Config | RMConfig | SFTConfig


def measured_peak(
    folder: Path, warm_up: StageConfig, config: StageConfig, launcher: str = "", gpu_file: str = ""
) -> int:
    """Of the run in a process of its own, where freed memory goes back to the system at once.

    Args:
        warm_up: Settings of a tiny run of the same stage.
        launcher: The launcher file that starts two such processes. The first one is measured.
        gpu_file: The launcher file for GPUs whose settings they take.
    """
    for name, one in (("warm_up", warm_up), ("run", config)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings_in_use(one)))
    stage = type(config).__module__.split(".")[1]
    program = ["-m", "tests.tools.plan.measured_run", stage, "warm_up.yaml", "run.yaml"]
    if launcher:
        file = str(ROOT / f"configs/accelerate/{launcher}.yaml")
        launch = ["-m", "accelerate.commands.launch", "--config_file", file]
        program = [*launch, *program, *([gpu_file] if gpu_file else [])]
    output = subprocess.check_output(
        [sys.executable, *program],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MALLOC_MMAP_THRESHOLD_": "262144",
            "MALLOC_ARENA_MAX": "1",
        },
        text=True,
    )
    return int(output.split("peak")[-1].split()[0])


def assert_as_planned(measured: int, planned: int) -> None:
    print(f"measured / planned: {measured / planned:.3f}, {planned / 1e6:.0f} MB planned")
    assert measured == pytest.approx(planned, rel=TOLERANCE)


def ppo_warm_up(folder: Path, config: Config) -> Config:
    inputs = write_inputs(folder / "tiny")
    return run_config(
        inputs,
        folder / "warm_up",
        rollout=replace(config.rollout, batch_size=2, max_new_tokens=2),
        ppo=replace(config.ppo, mini_batch_size=2),
        ptx=replace(config.ptx, text=str(inputs / "text.jsonl"), block_tokens=8),
        ema_decay=config.ema_decay,
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (SMALL, {}),
        (LARGE, {}),
        (SMALL, {"ptx": TEXT, "ema_decay": 0.9, "micro_batch_tokens": 512}),
        (SMALL, {"ptx": TAUGHT, "micro_batch_tokens": 512}),
        (LARGE, {"lora": LoraSettings(rank=8)}),
    ],
    ids=["6.6M", "22M", "6.6M with text", "6.6M with the reference on text", "22M with adapters"],
)
def test_the_peak_of_a_run_is_what_was_planned(
    size: dict[str, int], changes: dict[str, Any], tmp_path: Path
) -> None:
    inputs = write_inputs(tmp_path / "inputs", **size)
    config = run_config(inputs, tmp_path / "run", **changes)
    config = replace(config, ptx=replace(config.ptx, text=str(inputs / "text.jsonl")))
    planned = make_plan(config, Launch()).peak
    assert_as_planned(measured_peak(tmp_path, ppo_warm_up(tmp_path, config), config), planned)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "gpu_file", "launch"),
    [
        ("cpu2", "", Launch(2)),
        ("cpu2_zero2", "", Launch(2, zero_stage=2)),
        ("cpu2_zero3", "", Launch(2, zero_stage=3)),
        ("cpu2", "fsdp2", Launch(2, mixed_precision="bf16", is_fsdp=True)),
        ("cpu2_zero2", "deepspeed_zero2", Launch(2, zero_stage=2, mixed_precision="bf16")),
        ("cpu2_zero3", "deepspeed_zero3", Launch(2, zero_stage=3, mixed_precision="bf16")),
    ],
    ids=["DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "ZeRO-2 in bf16", "ZeRO-3 in bf16"],
)
def test_the_peak_of_each_process_is_what_was_planned(
    launcher: str, gpu_file: str, launch: Launch, tmp_path: Path
) -> None:
    if launch.zero_stage:
        pytest.importorskip("deepspeed")
    inputs = write_inputs(tmp_path / "inputs", **LARGE)
    config = run_config(inputs, tmp_path / "run")
    config = replace(config, ptx=replace(config.ptx, text=str(inputs / "text.jsonl")))
    planned = make_plan(config, launch).peak
    warm_up = ppo_warm_up(tmp_path, config)
    measured = measured_peak(tmp_path, warm_up, config, launcher, gpu_file)
    assert_as_planned(measured, planned)


@pytest.mark.slow
@pytest.mark.long
def test_the_peak_of_a_reward_model_on_rankings_is_what_was_planned(tmp_path: Path) -> None:
    """Four responses share a prompt in rows of 1024 tokens, so masks and copies of keys count."""
    inputs = write_inputs(tmp_path / "inputs", **SMALL)
    config = ranking_config(inputs, tmp_path / "run", response_tokens=228)
    warm_up = ranking_config(
        write_inputs(tmp_path / "tiny"), tmp_path / "warm_up", response_tokens=8
    )
    planned = make_plan(config, Launch()).peak
    assert_as_planned(measured_peak(tmp_path, warm_up, config), planned)


@pytest.mark.slow
@pytest.mark.long
def test_the_peak_of_fine_tuning_is_what_was_planned(tmp_path: Path) -> None:
    """Two rows of 240 tokens a pass, three passes a step, and moments from the second step on."""
    inputs = write_inputs(tmp_path / "inputs", **SMALL)
    config = fine_tuning_config(inputs, tmp_path / "run", response_tokens=128)
    config = replace(config, num_epochs=2)
    warm_up = fine_tuning_config(
        write_inputs(tmp_path / "tiny"), tmp_path / "warm_up", response_tokens=8
    )
    planned = make_plan(config, Launch()).peak
    assert_as_planned(measured_peak(tmp_path, warm_up, config), planned)
