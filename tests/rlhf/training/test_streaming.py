"""Tests the gathering of single weights in one process; tests/distributed has two."""

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.distributed import HashStore, destroy_process_group, init_process_group
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from rlhf.training.streaming import gathered, whole_shape


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """A mesh of this process alone."""
    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_a_named_shard_is_whole_in_its_place_and_in_its_type(mesh: DeviceMesh) -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.Linear(1, 1))
    third = torch.tensor([[1 / 3, 1.0]])
    shard = nn.Parameter(distribute_tensor(third, mesh, [Shard(0)]))
    model[0].weight, plain = shard, model[0].bias
    other = model[1].weight = nn.Parameter(distribute_tensor(third, mesh, [Shard(0)]))
    with gathered(model, ["0.weight", "0.bias"], torch.bfloat16):
        whole = model[0].weight
        assert not isinstance(whole, DTensor) and whole.dtype == torch.bfloat16
        assert whole.tolist() == [[0.333984375, 1.0]]  # 171 / 512 is the bfloat16 next to 1 / 3
        assert model[0].bias is plain and model[1].weight is other
    assert model[0].weight is shard
    with gathered(model, ["0.weight"]):
        assert torch.equal(model[0].weight, third)
    with pytest.raises(KeyError), gathered(model, ["0.weight"]):
        raise KeyError
    assert model[0].weight is shard and shard.requires_grad


def test_the_shape_is_that_of_the_whole_weight(mesh: DeviceMesh) -> None:
    weight = torch.zeros(3, 2)
    assert whole_shape(weight) == whole_shape(distribute_tensor(weight, mesh, [Shard(0)])) == (3, 2)
    split = nn.Parameter(torch.zeros(0))
    split.ds_shape = torch.Size((3, 2))  # type: ignore[attr-defined]
    assert whole_shape(split) == (3, 2)
