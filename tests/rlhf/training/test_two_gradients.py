"""Compares the gradients (3, 0) and (0, 4) of one step by hand."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from rlhf.training.step import Step, TrainState
from rlhf.training.two_gradients import GradientComparison, TwoGradients


def weigh(ratio: float | None, first: list[float]) -> tuple[GradientComparison, list[float]]:
    """Return the comparison of the gradients `first` and (0, 4), and the gradient for the step."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    state: TrainState[nn.Linear] = TrainState(
        model, [model], optimizer, schedule, Accelerator(cpu=True), math.inf
    )
    step = Step(state)
    gradients = TwoGradients(state, list(model.parameters()))
    step.add((model.weight * torch.tensor([first])).sum())
    gradients.end_first()
    step.add((model.weight * torch.tensor([[0.0, 4.0]])).sum())
    found = gradients.compare(ratio)
    assert model.weight.grad is not None
    return found, model.weight.grad.flatten().tolist()


def test_norms_and_cosine_are_those_of_each_alone_and_the_sum_stays() -> None:
    found, left = weigh(None, [3.0, 0.0])
    assert found == GradientComparison(first_norm=3.0, second_norm=4.0, cosine=0.0, factor=1.0)
    assert left == [3.0, 4.0]
    found, _ = weigh(None, [3.0, 3.0])
    assert found.cosine == pytest.approx(math.sqrt(0.5), abs=1e-6)


def test_the_first_is_brought_to_a_multiple_of_the_second() -> None:
    """Twice the norm 4 is 8, so the factor of the first is 8 / 3."""
    found, left = weigh(2.0, [3.0, 0.0])
    assert found.factor == pytest.approx(8 / 3) and found.first_norm == pytest.approx(8.0)
    assert left == pytest.approx([8.0, 4.0], abs=1e-5)


def test_a_first_gradient_of_zeros_stays_one() -> None:
    found, left = weigh(2.0, [0.0, 0.0])
    assert (found.first_norm, found.second_norm, found.cosine) == (0.0, 4.0, 0.0)
    assert left == [0.0, 4.0]
