"""Tests what differs under DeepSpeed without starting it; tests/distributed starts it."""

import math
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from rlhf.training import sharding


@pytest.mark.parametrize(
    ("launched", "precision", "expected"),
    [
        (DistributedType.DEEPSPEED, "bf16", torch.bfloat16),
        (DistributedType.DEEPSPEED, "no", torch.float32),
        (DistributedType.NO, "no", torch.float32),
    ],
)
def test_a_frozen_model_works_in_the_launchers_type(
    launched: DistributedType,
    precision: str,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "distributed_type", launched)
    monkeypatch.setattr(type(accelerator), "mixed_precision", precision)
    with sharding.autocast_unwrapped(accelerator):
        assert torch.nn.Linear(2, 2)(torch.ones(2)).dtype == expected


def weights_with_gradients(*gradients: list[float]) -> list[torch.nn.Parameter]:
    weights = [torch.nn.Parameter(torch.zeros(len(one))) for one in gradients]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = torch.tensor(gradient)
    return weights


@pytest.mark.parametrize("is_copied", [False, True])
def test_shards_are_clipped_with_one_copy_at_a_time(
    is_copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm is 5. DeepSpeed copies a shard to read it, in bfloat16 or on the host."""
    copies: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0
    read = sharding._local_gradient

    def read_and_count(parameter: torch.nn.Parameter) -> torch.Tensor:
        nonlocal most
        gradient = read(parameter).clone() if is_copied else read(parameter)
        copies.add(gradient)
        most = max(most, len(copies))
        return gradient

    monkeypatch.setattr(sharding, "_local_gradient", read_and_count)
    monkeypatch.setattr(sharding, "shards_gradients", lambda _: True)
    frozen = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
    weights = [*weights_with_gradients([3.0, 0.0], [4.0], [0.0]), frozen]
    accelerator = Accelerator(cpu=True)
    assert sharding.clip_gradients(accelerator, weights, 10.0) == 5.0
    assert [one.grad.tolist() for one in weights if one.grad is not None] == [[3, 0], [4], [0]]
    assert sharding.clip_gradients(accelerator, iter(weights), 1.0) == 5.0
    found = [number for one in weights if one.grad is not None for number in one.grad.tolist()]
    assert found == pytest.approx([0.6, 0.0, 0.8, 0.0], abs=1e-6)
    assert most == 2  # the next is read before the last is let go


def test_a_factor_of_zero_takes_nan_away() -> None:
    (weight,) = weights_with_gradients([math.nan, 1.0])
    sharding.scale_gradients([weight], 0.0)
    assert weight.grad is not None
    assert weight.grad.tolist() == [0.0, 0.0]
