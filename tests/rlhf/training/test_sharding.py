"""Tests what differs under DeepSpeed without starting it; tests/distributed starts it."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from rlhf.training import sharding


@pytest.mark.parametrize(
    ("launched", "precision", "expected"),
    [
        (DistributedType.DEEPSPEED, "bf16", torch.bfloat16),
        (DistributedType.DEEPSPEED, "no", torch.float32),
        (DistributedType.NO, "no", torch.float32),
    ],
)
def test_a_frozen_model_works_in_the_launchers_type(
    launched: DistributedType,
    precision: str,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "distributed_type", launched)
    monkeypatch.setattr(type(accelerator), "mixed_precision", precision)
    with sharding.autocast_unwrapped(accelerator):
        assert torch.nn.Linear(2, 2)(torch.ones(2)).dtype == expected
