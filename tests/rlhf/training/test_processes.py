"""Tests what a process learns from its launcher, and passes on to transformers' Trainers."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

import rlhf.training.processes
from rlhf.training.processes import (
    is_on_cpu,
    share_accelerator,
    use_share_of_cores,
    warn_of_float32,
)


def test_one_process_that_sees_several_gpus_takes_one(tmp_path: Path) -> None:
    """Otherwise the Trainer would use DataParallel, with one batch for each GPU."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for num_gpus, taken in ((4, 1), (1, 1), (0, 0)):
        arguments._n_gpu = num_gpus
        share_accelerator(arguments)
        assert arguments.n_gpu == taken
        assert arguments.train_batch_size == arguments.per_device_train_batch_size


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_launcher_says_whether_a_trainer_stays_on_the_cpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(rlhf.training.processes, "PartialState", lambda: state)
    assert is_on_cpu() == (device == "cpu")


def accelerator_of(device: str, mixed_precision: str, is_main: bool = True) -> Any:
    return SimpleNamespace(
        device=torch.device(device), mixed_precision=mixed_precision, is_main_process=is_main
    )


def test_a_gpu_without_mixed_precision_is_warned_of_with_the_remedy() -> None:
    with pytest.warns(UserWarning, match=r"float32 on cuda.*configs/accelerate/gpu\.yaml"):
        warn_of_float32(accelerator_of("cuda", "no"))


@pytest.mark.parametrize(
    ("device", "mixed_precision", "is_main", "dtype"),
    [
        ("cpu", "no", True, "float32"),
        ("cuda", "bf16", True, "float32"),
        ("cuda", "no", True, "bfloat16"),
        ("cuda", "no", False, "float32"),
    ],
)
def test_no_other_start_is_warned_of(
    device: str, mixed_precision: str, is_main: bool, dtype: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_float32(accelerator_of(device, mixed_precision, is_main), dtype)


@pytest.mark.parametrize(
    ("environment", "launcher", "threads"),
    [
        ({}, {}, 6),
        ({"OMP_NUM_THREADS": "1"}, {}, None),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, {}, 3),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8"}, {}, 1),
        ({"LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}, {"OMP_NUM_THREADS": "1"}, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, {}, 6),
    ],
)
def test_each_process_has_its_share_of_the_cores(
    environment: dict[str, str],
    launcher: dict[str, str],
    threads: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Launchers set one thread if the user gave no number; a number from the user stays."""
    for name in ("OMP_NUM_THREADS", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(6)), raising=False)
    monkeypatch.setattr("psutil.Process.environ", lambda _: launcher)
    use_share_of_cores()
    assert given == ([] if threads is None else [threads])
