"""Tests our use of DeepSpeed's internals without starting it; tests/distributed starts it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf.training.compat import forget_empty_steps


@pytest.mark.parametrize("step", [3, torch.tensor(3.0)], ids=["DeepSpeed's CPU Adam", "torch's"])
def test_steps_that_saw_zeros_only_are_forgotten(step: Any) -> None:
    states = {
        name: {"step": step, "exp_avg_sq": torch.full((2,), square)}
        for name, square in (("frozen", 0.0), ("trained", 0.1))
    }
    adam = SimpleNamespace(state=states)
    forget_empty_steps(SimpleNamespace(optimizer=SimpleNamespace(optimizer=adam)))
    assert {name: float(state["step"]) for name, state in states.items()} == {
        "frozen": 0.0,
        "trained": 3.0,
    }
    assert type(states["frozen"]["step"]) is type(step)
