"""The model that a stage trained is out of memory when the stage loads what it saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import ref

import pytest
from torch import nn

from stages.rm import saved, setup
from stages.rm import train as rm
from stages.sft import train as sft
from tests.distributed.chain import LORA, make_inputs, rm_settings, sft_settings

Alive = list[int]
"""For each load, how many models of earlier loads were still in memory."""


@pytest.fixture
def inputs(tmp_path: Path) -> Path:
    make_inputs(tmp_path, num_rows=8)
    return tmp_path


def watch_loads(patch: pytest.MonkeyPatch, *functions: tuple[Any, str]) -> Alive:
    """Count models at every call of these functions, which return a model or its holder."""
    weights: list[ref[nn.Parameter]] = []
    alive: Alive = []

    def watched(load: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            alive.append(sum(weight() is not None for weight in weights))
            loaded = load(*arguments, **options)
            model = getattr(loaded, "model", loaded)
            weights.append(ref(next(p for p in model.parameters() if p.ndim == 2)))
            return loaded

        return call

    for module, name in functions:
        patch.setattr(module, name, watched(getattr(module, name)))
    return alive


def test_sft_lets_go_of_what_it_trained(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = watch_loads(monkeypatch, (sft, "load_policy"))
    sft.train(sft_settings(inputs, inputs / "sft"))
    assert alive == [0, 0]


@pytest.mark.parametrize("changes", [{}, {"lora": LORA}], ids=["all weights", "adapter"])
def test_the_reward_model_lets_go_of_what_it_trained(
    changes: dict[str, Any], inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = watch_loads(
        monkeypatch,
        (setup, "load_scalar"),
        (saved, "load_scalar"),
        (saved, "load_reward_model"),
    )
    rm.train(rm_settings(inputs, inputs / "base", inputs / "rm", num_epochs=1, **changes))
    assert alive == [0, 0, 0]
