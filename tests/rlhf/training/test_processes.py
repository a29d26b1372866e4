"""What transformers' Trainers are told of the launch."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

import rlhf.training.processes
from rlhf.training.processes import is_on_cpu, use_accelerator_at_work


def test_one_process_that_sees_several_gpus_takes_one(tmp_path: Path) -> None:
    """The Trainer would wrap the model in DataParallel, and take a batch for each."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    for num_gpus, taken in ((4, 1), (1, 1), (0, 0)):
        arguments._n_gpu = num_gpus
        use_accelerator_at_work(arguments)
        assert arguments.n_gpu == taken
        assert arguments.train_batch_size == arguments.per_device_train_batch_size


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_launcher_says_whether_a_trainer_stays_on_the_cpu(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(device=torch.device(device))
    monkeypatch.setattr(rlhf.training.processes, "PartialState", lambda: state)
    assert is_on_cpu() == (device == "cpu")
