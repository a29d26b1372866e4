"""Tests schedules, parameter groups and the moving average with numbers worked by hand."""

import math
from copy import deepcopy

import pytest
import torch
from torch import nn

from rlhf.training.optim import (
    MovingAverage,
    MuonAndAdamW,
    make_optimizer,
    make_schedule,
    orthogonalize,
    schedule_factor,
)
from rlhf.training.settings import OptimSettings
from rlhf.training.sharding import local_gradients


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
    """The average is 0.75 * 1 + 0.25 * 3 = 1.5, then 0.75 * 1.5 + 0.25 * 5 = 2.375."""
    module = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
        average = MovingAverage(module, decay=0.75)
        for weight in (3.0, 5.0):
            module.weight.fill_(weight)
            average.update()
    assert average.average["weight"].dtype == torch.float32
    assert average.average["weight"].item() == 2.375
    with pytest.raises(KeyError), average.in_place():
        assert module.weight.item() == 2.375
        raise KeyError
    assert module.weight.item() == 5.0
    average.put_in_place()
    assert module.weight.item() == 2.375


def test_missing_gradients_count_as_zero() -> None:
    module = nn.Linear(2, 1)
    module.weight.grad = torch.ones(1, 2)
    assert [g.tolist() for g in local_gradients(module.parameters())] == [[1.0, 1.0], [0.0]]


def test_orthogonal_matrices_keep_their_directions_and_lose_their_sizes() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = (
        torch.randn(3, 6, 4, generator=generator) * torch.tensor([1e-3, 1.0, 50.0])[:, None, None]
    )
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape
    for before, after in zip(matrices, found, strict=True):
        assert torch.linalg.svdvals(after).sub(0.95).abs().max() < 0.3
        u, _, v = torch.linalg.svd(before, full_matrices=False)
        in_its_directions = u.T @ after @ v.T
        assert in_its_directions.sub(in_its_directions.diag().diag()).abs().max() < 1e-3


def test_muon_moves_the_inner_matrices_and_adamw_the_rest() -> None:
    model = nn.Sequential()
    model.embed_tokens, model.inner, model.lm_head = (
        nn.Embedding(5, 2),
        nn.Linear(2, 2),
        nn.Linear(2, 5, bias=False),
    )
    settings = OptimSettings(learning_rate=0.1, matrix_learning_rate=0.5, weight_decay=0.0)
    optimizer = make_optimizer([(model, 0.1)], settings)
    assert isinstance(optimizer, MuonAndAdamW)
    groups = {group["muon"]: group for group in optimizer.param_groups if group["lr"] == 0.5}
    assert [id(p) for p in groups[True]["params"]] == [id(model.inner.weight)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.inner.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 0.02]])
    optimizer.step()
    moved = before["inner.weight"] - model.inner.weight.detach()
    # A diagonal gradient gives a diagonal step of the rate times a singular value near 1.
    assert moved[0, 1] == pytest.approx(0, abs=1e-6) and moved[1, 0] == pytest.approx(0, abs=1e-6)
    assert 0.3 < moved[0, 0] < 0.65 and 0.1 < moved[1, 1] < 0.65
    for name in ("embed_tokens.weight", "inner.bias", "lm_head.weight"):  # Adam's first step: lr
        change = before[name] - dict(model.named_parameters())[name].detach()
        assert change.numpy() == pytest.approx(torch.full_like(change, 0.1).numpy(), abs=1e-5)


def test_muon_goes_on_from_a_saved_state_and_refuses_shards() -> None:
    def make() -> tuple[nn.Linear, MuonAndAdamW]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 3)
        optimizer = make_optimizer([(layer, 0.1)], OptimSettings(matrix_learning_rate=0.1))
        assert isinstance(optimizer, MuonAndAdamW)
        return layer, optimizer

    def step(layer: nn.Linear, optimizer: MuonAndAdamW, number: int) -> None:
        layer.weight.grad = torch.randn(3, 3, generator=torch.Generator().manual_seed(number))
        optimizer.step()

    layer, optimizer = make()
    other, resumed = make()
    step(layer, optimizer, 1)
    other.load_state_dict(layer.state_dict())
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))
    step(layer, optimizer, 2)
    step(other, resumed, 2)
    assert torch.equal(layer.weight, other.weight)
    flat = nn.Parameter(torch.zeros(4))
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ValueError, match="matrix_learning_rate"):
        optimizer.step()
