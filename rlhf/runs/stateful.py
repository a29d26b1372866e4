"""Gives what a run carries from step to step as states that a checkpoint can hold.

A state holds tensors and plain values by name. Loading is strict: it wants all names and the same
shapes."""

import random
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from rlhf.training.parameters import check_names, copy_into, trained_parameters
from rlhf.training.step import TrainState

State = dict[str, Any]
"""Maps a name to a tensor, a plain JSON value, or another State."""


class Stateful(Protocol):
    """A part of what a run carries. Its methods have torch's names for saving and loading."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, /) -> object: ...


class Weights:
    """The weights that learn. Frozen ones, such as an adapter's base, come from their source.

    Loading copies into the existing tensors, because an optimizer holds them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = trained_parameters(module)

    def state_dict(self) -> State:
        return {**self._parameters}

    def load_state_dict(self, state: State) -> None:
        copy_into(self._parameters, state)


class OptimizerState:
    """The state of an optimizer, by parameter names, since torch's parameter numbers may change."""

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        self._optimizer = optimizer
        self._module = module

    @property
    def _names(self) -> list[str]:
        """Parameter names in the optimizer's order. They are looked up only to save or load.

        DeepSpeed's optimizers hold other parameters than the module's, and are never saved."""
        of_parameter = {id(p): name for name, p in trained_parameters(self._module).items()}
        groups = self._optimizer.param_groups
        return [of_parameter[id(p)] for group in groups for p in group["params"]]

    def state_dict(self) -> State:
        """Return moments and groups. A parameter that was never stepped has no moments."""
        state = self._optimizer.state_dict()
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in state["param_groups"]
        ]
        names = self._names
        moments = {names[number]: of_one for number, of_one in state["state"].items()}
        return {"moments": moments, "groups": groups}

    def load_state_dict(self, state: State) -> None:
        numbers = {name: number for number, name in enumerate(self._names)}
        present = self._optimizer.state_dict()["param_groups"]
        check_names(set(state["moments"]) - set(numbers), set(), "optimizer state")
        groups = [
            {**saved, "params": group["params"]}
            for saved, group in zip(state["groups"], present, strict=True)
        ]
        moments = {numbers[name]: of_one for name, of_one in state["moments"].items()}
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def parts_of(state: TrainState) -> dict[str, Stateful]:
    """Return what a checkpoint must hold of the trained model, by name."""
    parts: dict[str, Stateful] = {
        "model": Weights(state.module),
        "optimizer": OptimizerState(state.optimizer, state.module),
        "schedule": state.schedule,
    }
    return parts if state.average is None else {**parts, "average": state.average}


class Generators:
    """All random generators of this process: the global ones, and some by name."""

    def __init__(self, **named: torch.Generator) -> None:
        self._named = named

    def state_dict(self) -> State:
        version, numbers, next_normal = random.getstate()
        state: State = {
            "torch": torch.get_rng_state(),
            "python": {"version": version, "numbers": list(numbers), "next_normal": next_normal},
            "numpy": _plain(np.random.get_state(legacy=False)),
            "named": {name: one.get_state() for name, one in self._named.items()},
        }
        if torch.cuda.is_available():
            state["cuda"] = torch.cuda.get_rng_state()
        return state

    def load_state_dict(self, state: State) -> None:
        check_names(state, self.state_dict(), "generators")
        check_names(state["named"], self._named, "generators")
        torch.set_rng_state(state["torch"])
        python = state["python"]
        random.setstate((python["version"], tuple(python["numbers"]), python["next_normal"]))
        np.random.set_state(state["numpy"])
        for name, generator in self._named.items():
            generator.set_state(state["named"][name])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])


class Together(dict[str, Stateful]):
    """Several parts by name, saved and loaded as one."""

    def state_dict(self) -> State:
        return {name: part.state_dict() for name, part in self.items()}

    def load_state_dict(self, state: State) -> None:
        check_names(state, self, "parts")
        for name, part in self.items():
            part.load_state_dict(state[name])


class Fields:
    """Some attributes of an object by name; they hold plain values."""

    def __init__(self, owner: object, *names: str) -> None:
        self._owner = owner
        self._names = names

    def state_dict(self) -> State:
        return {name: getattr(self._owner, name) for name in self._names}

    def load_state_dict(self, state: State) -> None:
        check_names(state, self._names, type(self._owner).__name__)
        for name in self._names:
            setattr(self._owner, name, state[name])


def _plain(value: Any) -> Any:
    """Turn NumPy arrays, also inside mappings, into lists."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value.tolist() if isinstance(value, np.ndarray) else value
