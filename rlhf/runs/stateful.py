"""Turns what a run carries from step to step into states that a checkpoint can hold.

A state holds tensors and plain values by name. Loading is strict: all names and shapes must be the
same."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.training import sharding
from rlhf.training.compat import load_zero_state, zero_state
from rlhf.training.parameters import check_names, copy_into, trained_parameters
from rlhf.training.step import TrainState

State = dict[str, Any]
"""Maps a name to a tensor, a plain JSON value, or another State."""


class Stateful(Protocol):
    """A part of a run's state. Its methods have torch's names for saving and loading."""

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State, /) -> object: ...


class Weights:
    """The trained weights, or this process's shards of them under FSDP2.

    Frozen weights, such as an adapter's base, are read from their own folder. Loading copies into
    the existing tensors, because an optimizer holds them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = trained_parameters(module)

    def state_dict(self) -> State:
        return {name: sharding.own_part(p).detach() for name, p in self._parameters.items()}

    def load_state_dict(self, state: State) -> None:
        copy_into(self.state_dict(), state)


class OptimizerState:
    """The state of an optimizer, by parameter names, since torch's parameter numbers may change.

    Under FSDP2 it holds this process's shards of the moments.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        self._optimizer = optimizer
        self._module = module

    @property
    def _parameters(self) -> dict[str, nn.Parameter]:
        """Parameters by name in the optimizer's order. They are looked up only to save or load."""
        names = {id(p): name for name, p in trained_parameters(self._module).items()}
        groups = self._optimizer.param_groups
        return {names[id(p)]: p for group in groups for p in group["params"]}

    def state_dict(self) -> State:
        """Return moments and groups. A parameter that was never stepped has no moments."""
        state = self._optimizer.state_dict()
        groups = [
            {key: value for key, value in group.items() if key != "params"}
            for group in state["param_groups"]
        ]
        names = list(self._parameters)
        moments = {names[number]: _own_parts(of_one) for number, of_one in state["state"].items()}
        return {"moments": moments, "groups": groups}

    def load_state_dict(self, state: State) -> None:
        parameters = self._parameters
        numbers = {name: number for number, name in enumerate(parameters)}
        present = self._optimizer.state_dict()["param_groups"]
        check_names(set(state["moments"]) - set(numbers), set(), "optimizer state")
        groups = [
            {**saved, "params": group["params"]}
            for saved, group in zip(state["groups"], present, strict=True)
        ]
        moments = {
            numbers[name]: _as_parts_of(parameters[name], of_one)
            for name, of_one in state["moments"].items()
        }
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def _own_parts(moments: Mapping[str, Any]) -> State:
    return {
        name: sharding.own_part(value) if isinstance(value, Tensor) else value
        for name, value in moments.items()
    }


def _as_parts_of(parameter: nn.Parameter, moments: State) -> State:
    """Split the moments as the parameter is, except for its step count, a tensor without axes."""
    return {
        name: sharding.as_part_of(parameter, value)
        if isinstance(value, Tensor) and value.ndim > 0
        else value
        for name, value in moments.items()
    }


class ZeroState:
    """The fp32 weights and the optimizer state that DeepSpeed's ZeRO keeps in this process."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the optimizer as accelerate wrapped it."""
        self._optimizer = optimizer

    def state_dict(self) -> State:
        return zero_state(self._optimizer.optimizer)  # type: ignore[attr-defined]

    def load_state_dict(self, state: State) -> None:
        load_zero_state(self._optimizer.optimizer, state)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class TrainedParts:
    """The parts of a trained model that a checkpoint must hold, by name."""

    shared: dict[str, Stateful]
    """the parts that are the same in all processes"""
    own: dict[str, Stateful]
    """the parts of which every process has a shard; empty if nothing is split"""


def parts_of(state: TrainState) -> TrainedParts:
    """Return the parts of the trained model that a checkpoint must hold."""
    averages: dict[str, Stateful] = {} if state.average is None else {"average": state.average}
    return trained_parts(state.accelerator, state.module, state.optimizer, state.schedule, averages)


def trained_parts(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: Stateful,
    averages: Mapping[str, Stateful],
) -> TrainedParts:
    """Return the parts that a checkpoint must hold of a model that the launcher may have split.

    Args:
        module: The model without the launcher's wrapper.
        optimizer: The optimizer as accelerate wrapped it.
        averages: Moving averages of the weights, which are split as the weights are.
    """
    if sharding.is_deepspeed(accelerator):  # the model's weights follow from ZeRO's
        trained: dict[str, Stateful] = {"zero": ZeroState(optimizer)}
    else:
        trained = {"model": Weights(module), "optimizer": OptimizerState(optimizer, module)}
    if sharding.shards_weights(accelerator):
        return TrainedParts({"schedule": schedule}, {**trained, **averages})
    if sharding.shards_gradients(accelerator):
        return TrainedParts({"schedule": schedule, **averages}, trained)
    return TrainedParts({**trained, "schedule": schedule, **averages}, {})


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


class StatefulDict(dict[str, Stateful]):
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
