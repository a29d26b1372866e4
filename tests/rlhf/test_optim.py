"""Schedules against numbers worked by hand; groups, and the moving average."""

import math

import pytest
import torch
from torch import nn

from rlhf.config import OptimSettings
from rlhf.optim import MovingAverage, make_optimizer, make_schedule, schedule_factor
from rlhf.sharding import local_gradients


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # InstructGPT's PPO: warm-up from a tenth of the peak, then constant.
        ({"schedule": "constant", "warmup_steps": 3}, [0.1, 0.4, 0.7, 1.0, 1.0, 1.0, 1.0]),
        (
            {"schedule": "linear", "min_lr_ratio": 0.0},
            [6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0],
        ),
        # Cosine to a tenth: 0.1 + 0.9 (1 + cos(pi k / 6)) / 2.
        (
            {"schedule": "cosine"},
            [0.1 + 0.45 * (1 + math.cos(math.pi * k / 6)) for k in range(7)],
        ),
        (
            {"schedule": "linear", "warmup_steps": 2, "min_lr_ratio": 0.5},
            [0.5, 0.75, 1.0, 0.875, 0.75, 0.625, 0.5],
        ),
    ],
)
def test_schedules_by_hand(settings: dict, expected: list[float]) -> None:
    factor = schedule_factor(OptimSettings(**settings), num_steps=7)
    assert [factor(step) for step in range(7)] == pytest.approx(expected, abs=1e-12)


def test_a_schedule_ends_at_its_lowest_and_stays_there() -> None:
    factor = schedule_factor(OptimSettings(schedule="linear", min_lr_ratio=0.2), num_steps=5)
    assert factor(4) == pytest.approx(0.2, abs=1e-12)
    assert factor(50) == pytest.approx(0.2, abs=1e-12)


def test_a_later_first_step_shifts_the_schedule_and_keeps_its_end() -> None:
    settings = OptimSettings(schedule="linear", min_lr_ratio=0.0)
    factor = schedule_factor(settings, num_steps=7, first_step=2)
    expected = [1.0, 1.0, 1.0, 3 / 4, 2 / 4, 1 / 4, 0.0]
    assert [factor(step) for step in range(7)] == pytest.approx(expected, abs=1e-12)


def test_every_module_has_its_own_peak_start_and_no_decay_on_vectors() -> None:
    policy, value = nn.Linear(2, 3), nn.Linear(3, 1)
    settings = OptimSettings(schedule="linear", weight_decay=0.1, min_lr_ratio=0.0)
    optimizer = make_optimizer([(policy, 1.0), (value, 10.0)], settings)
    found = [(g["module"], g["weight_decay"], g["params"][0].ndim) for g in optimizer.param_groups]
    assert found == [(0, 0.1, 2), (0, 0.0, 1), (1, 0.1, 2), (1, 0.0, 1)]
    schedule = make_schedule(optimizer, settings, num_steps=3, first_steps={0: 1})
    rates = [[group["lr"] for group in optimizer.param_groups]]
    for _ in range(2):
        optimizer.step()
        schedule.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    assert rates == [[1, 1, 10, 10], [1, 1, 5, 5], [0, 0, 0, 0]]


def test_settings_of_adam_reach_it() -> None:
    settings = OptimSettings(betas=(0.8, 0.9), eps=1e-5)
    (group,) = make_optimizer([(nn.Linear(2, 2, bias=False), 0.5)], settings).param_groups
    assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-5, 0.0)


def test_frozen_parameters_are_left_out() -> None:
    module = nn.Linear(2, 2)
    module.weight.requires_grad_(False)
    (group,) = make_optimizer([(module, 0.5)], OptimSettings()).param_groups
    assert group["params"] == [module.bias]


def test_moving_average_by_hand_and_in_fp32() -> None:
    """0.75 * 1 + 0.25 * 3 = 1.5, then 0.75 * 1.5 + 0.25 * 5 = 2.375."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
        average = MovingAverage(module, decay=0.75)
        for weight in (3.0, 5.0):
            module.weight.fill_(weight)
            average.update(module)
    assert average.average["weight"].dtype == torch.float32
    assert average.average["weight"].item() == 2.375
    average.copy_to(module)
    assert module.weight.item() == 2.375


def test_missing_gradients_count_as_zero() -> None:
    module = nn.Linear(2, 1)
    module.weight.grad = torch.ones(1, 2)
    assert [g.tolist() for g in local_gradients(module.parameters())] == [[1.0, 1.0], [0.0]]
