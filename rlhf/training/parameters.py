"""Finds the trained parameters of a model by name, and copies a state into them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

_REMEDY = "go on with the version of the program that wrote it, or delete it to start anew"


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name, each only once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@torch.no_grad()
def copy_into(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy the values of a state into tensors of the same names and shapes."""
    check_shapes(state, tensors)
    for name, tensor in tensors.items():
        tensor.copy_(state[name])


def check_shapes(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless a state has exactly these names, with tensors of these shapes."""
    check_names(found, expected, "weights")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has shape {tuple(found[name].shape)} in the checkpoint and "
                f"{tuple(tensor.shape)} in this run; {_REMEDY}"
            )


def check_names(found: Iterable[str], expected: Iterable[str], what: str) -> None:
    """Raise ValueError unless a state has exactly these names."""
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    for names, how in ((missing, "not in the checkpoint"), (unknown, "only in the checkpoint")):
        if names:
            raise ValueError(f"{what}: {', '.join(names[:3])} {how}; {_REMEDY}")
