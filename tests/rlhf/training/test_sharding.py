"""What differs under DeepSpeed, without a start of it; tests/distributed starts it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from rlhf.training import sharding


@pytest.mark.parametrize("step", [3, torch.tensor(3.0)], ids=["DeepSpeed's CPU Adam", "torch's"])
def test_steps_that_saw_zeros_only_are_forgotten(step: Any) -> None:
    states = {
        name: {"step": step, "exp_avg_sq": torch.full((2,), square)}
        for name, square in (("frozen", 0.0), ("trained", 0.1))
    }
    adam = SimpleNamespace(state=states)
    sharding._forget_empty_steps(SimpleNamespace(optimizer=SimpleNamespace(optimizer=adam)))
    assert {name: float(state["step"]) for name, state in states.items()} == {
        "frozen": 0.0,
        "trained": 3.0,
    }
    assert type(states["frozen"]["step"]) is type(step)


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
