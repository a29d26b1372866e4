"""States of models, optimizers and generators come back to the bit."""

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rlhf.runs.stateful import Fields, Generators, OptimizerState, StatefulDict, Weights


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False))


def first_layer(module: nn.Sequential) -> nn.Linear:
    layer = module[0]
    assert isinstance(layer, nn.Linear)
    return layer


def adamw(module: nn.Module) -> torch.optim.AdamW:
    decayed, plain = ([p for p in module.parameters() if (p.ndim > 1) == d] for d in (True, False))
    return torch.optim.AdamW(
        [{"params": decayed, "lr": 0.1}, {"params": plain, "lr": 0.01, "weight_decay": 0.0}]
    )


def step(module: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    inputs = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    module(inputs).square().sum().backward()
    optimizer.step()


def copy(state: dict[str, Any]) -> dict[str, Any]:
    """Copy a state, as a file would hold it."""
    return {
        key: copy(value)
        if isinstance(value, dict)
        else value.clone()
        if isinstance(value, torch.Tensor)
        else value
        for key, value in state.items()
    }


def test_a_model_and_its_optimizer_go_on_to_the_same_bits() -> None:
    module = model()
    optimizer = adamw(module)
    for seed in (1, 2):
        step(module, optimizer, seed)
    weights = copy(Weights(module).state_dict())
    moments = copy(OptimizerState(optimizer, module).state_dict())
    optimizer.param_groups[0]["lr"] = 0.3  # as a schedule does after the checkpoint
    step(module, optimizer, 3)
    other = model()
    with torch.no_grad():
        first_layer(other).weight.zero_()
    resumed = adamw(other)
    resumed.param_groups[1]["lr"] = 7.0
    Weights(other).load_state_dict(weights)
    OptimizerState(resumed, other).load_state_dict(moments)
    assert [group["lr"] for group in resumed.param_groups] == [0.1, 0.01]
    assert resumed.state[first_layer(other).weight]["step"] == 2
    resumed.param_groups[0]["lr"] = 0.3
    step(other, resumed, 3)
    for found, expected in zip(other.parameters(), module.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_moments_bear_the_names_of_parameters_and_only_of_stepped_ones() -> None:
    module = model()
    optimizer = adamw(module)
    first_layer(module).bias.requires_grad_(True)
    step(module, optimizer, 1)
    assert set(OptimizerState(optimizer, module).state_dict()["moments"]) == {
        "0.weight", "0.bias", "1.weight"
    }  # fmt: skip
    fresh = adamw(module)
    assert OptimizerState(fresh, module).state_dict()["moments"] == {}


def test_frozen_weights_are_not_of_the_state() -> None:
    module = model()
    module[0].requires_grad_(False)
    assert set(Weights(module).state_dict()) == {"1.weight"}


def test_weights_are_written_in_place_and_only_whole() -> None:
    module = model()
    first = first_layer(module).weight
    state = copy(Weights(module).state_dict())
    Weights(module).load_state_dict({**state, "0.weight": torch.ones(4, 3)})
    assert first_layer(module).weight is first and bool((first == 1).all())
    with pytest.raises(ValueError, match=r"0\.bias not in the checkpoint"):
        Weights(module).load_state_dict({k: v for k, v in state.items() if k != "0.bias"})
    with pytest.raises(ValueError, match=r"more only in the checkpoint"):
        Weights(module).load_state_dict({**state, "more": torch.ones(1)})
    with pytest.raises(ValueError, match=r"0\.bias has shape \(1,\).*\(4,\)"):
        Weights(module).load_state_dict({**state, "0.bias": torch.ones(1)})


def draws(own: torch.Generator) -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        float(torch.randn((), generator=own)),
    ]


def test_generators_go_on_with_the_same_numbers() -> None:
    own = torch.Generator().manual_seed(3)
    draws(own)  # two of them now keep the second of a pair of normal numbers
    state = copy(Generators(own=own).state_dict())
    expected = [draws(own) for _ in range(3)]
    other = torch.Generator()
    Generators(own=other).load_state_dict(state)
    assert [draws(other) for _ in range(3)] == expected
    with pytest.raises(ValueError, match="own only in the checkpoint"):
        Generators().load_state_dict(state)


def test_parts_together_are_all_there_or_refused() -> None:
    weights = {name: Weights(model()) for name in ("first", "second")}
    state = copy(StatefulDict(weights).state_dict())
    state["second"]["1.weight"].fill_(7.0)
    StatefulDict(weights).load_state_dict(state)
    assert bool((weights["second"].state_dict()["1.weight"] == 7).all())
    assert not bool((weights["first"].state_dict()["1.weight"] == 7).any())
    with pytest.raises(ValueError, match="parts: second only in the checkpoint"):
        StatefulDict(first=weights["first"]).load_state_dict(state)


def test_fields_are_all_there_or_refused() -> None:
    class Counter:
        count = 3
        best: float | None = None

    state = Fields(Counter(), "count", "best").state_dict()
    assert state == {"count": 3, "best": None}
    counter = Counter()
    Fields(counter, "count", "best").load_state_dict({"count": 5, "best": 0.1})
    assert (counter.count, counter.best) == (5, 0.1)
    with pytest.raises(ValueError, match="Counter: best not in the checkpoint"):
        Fields(counter, "count", "best").load_state_dict({"count": 5})
