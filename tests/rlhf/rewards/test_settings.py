"""Tests settings of the reward: contradictions, and the models that they name."""

from typing import Any

import pytest

from rlhf.rewards.settings import EnsembleSettings, PartSettings, RewardSettings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "model is None, function is None, parts is None, .*models is None; give exactly one"),
        ({"model": "rm", "function": "a:b"}, "model is 'rm', function is 'a:b', .*exactly one"),
        (
            {"model": "rm", "parts": {"x": PartSettings(function="a:b")}},
            r"model is 'rm', .*parts is \['x'\].*exactly one",
        ),
        (
            {"function": "a:b", "ensemble": EnsembleSettings(models=("x", "y"))},
            r"function is 'a:b', .*ensemble.models is \['x', 'y'\]; give exactly one",
        ),
        ({"model": "rm", "missing_end_value": -1.0}, "reward responses without an end"),
        ({"model": "rm", "missing_end_value": float("nan")}, "missing_end_value is nan"),
        ({"model": "rm", "clip": 0.0}, "clip is 0.0"),
        ({"model": "rm", "per_token": True}, "per_token is True and function is None"),
        (
            {"model": "rm", "normalize_on": 1},
            "normalize_on is 1; .* 2 or more, or null",
        ),
        ({"model": "rm", "debias_length": True}, "debias_length is True and normalize_on is None"),
        (
            {"parts": {"x": PartSettings(model="rm", debias_length=True)}},
            "debias_length is True and normalize_on is None",
        ),
        (
            {"parts": {"x": PartSettings(model="rm")}, "debias_length": True, "normalize_on": 8},
            "debias_length is True and the reward has parts.*; set debias_length on a part, such",
        ),
        (
            {"model": "rm", "debias_length": True, "normalize_on": 3},
            "normalize_on is 3; .*give 4 or more",
        ),
        (
            {"model": "rm", "length_penalty": -0.1},
            "length_penalty is -0.1; .* 0 or more",
        ),
        ({"model": "rm", "length_penalty": float("nan")}, "length_penalty is nan"),
        ({"model": "rm", "length_allowance": -1}, "length_allowance is -1"),
        ({"parts": {"a b": PartSettings(model="x")}}, "parts has the name 'a b'"),
    ],
)
def test_contradictory_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSettings(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "exactly one"),
        ({"model": "rm", "function": "a:b"}, "exactly one"),
        ({"model": "rm", "per_token": True}, "per_token is True and function is None"),
        ({"model": "rm", "weight": 0.0}, "weight is 0.0"),
        ({"model": "rm", "weight": float("inf")}, "weight is inf"),
    ],
)
def test_contradictory_parts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartSettings(**changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"models": ("rm",)}, "models has one member, rm; .*reward.model"),
        ({"models": ("a", "b"), "spread_coef": -1.0}, "spread_coef is -1.0"),
    ],
)
def test_contradictory_ensembles_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnsembleSettings(**changes)


def test_all_models_are_named_and_the_first_starts_the_value_model() -> None:
    parts = {
        "brief": PartSettings(function="a:b"),
        "good": PartSettings(model="rm", weight=-0.5),
        "safe": PartSettings(model="rm2"),
    }
    of_parts = RewardSettings(parts=parts)
    assert of_parts.model_paths == {"parts.good": "rm", "parts.safe": "rm2"}
    assert of_parts.value_start == ("rm", -0.5)
    ensemble = RewardSettings(ensemble=EnsembleSettings(models=("x", "y")))
    assert ensemble.model_paths == {"ensemble.0": "x", "ensemble.1": "y"}
    assert ensemble.value_start == ("x", 1.0)
    assert RewardSettings(model="rm").value_start == ("rm", 1.0)
    assert RewardSettings(function="a:b").value_start is None
