"""Models are moved to the device for their use, and back."""

import pytest
import torch
from torch import nn

from rlhf.training.offloading import on_device

CUDA = torch.device("cuda")


class Traveller(nn.Module):
    """Records the devices to which it is moved."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[str] = []

    # Module.to can be called in more ways, which on_device does not use.
    def to(self, device: torch.device | str) -> "Traveller":  # type: ignore[override]
        self.sent.append(torch.device(device).type)
        return self


def test_models_come_for_their_use_and_go_also_after_an_error() -> None:
    models = [Traveller(), Traveller()]
    with on_device(models, CUDA, offload=True):
        assert [model.sent for model in models] == [["cuda"], ["cuda"]]
    with pytest.raises(ValueError), on_device(models, CUDA, offload=True):
        raise ValueError
    assert [model.sent for model in models] == [["cuda", "cpu"] * 2] * 2


@pytest.mark.parametrize(("device", "offload"), [("cuda", False), ("cpu", True)])
def test_models_that_need_not_move_do_not(device: str, offload: bool) -> None:
    model = Traveller()
    with on_device([model], torch.device(device), offload):
        pass
    assert model.sent == []


class Copied(nn.Linear):
    """Moves to a GPU as every module does: its Parameters get copies of their weights."""

    def to(self, device: torch.device | str) -> "Copied":  # type: ignore[override]
        if torch.device(device).type == "cuda":
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()
        return self


def test_frozen_weights_take_their_place_in_cpu_memory_again() -> None:
    """Others may have changed on the device."""
    model = Copied(2, 2)
    model.weight.requires_grad_(False)
    weight, bias = model.weight.data, model.bias.data
    before = bias.clone()
    with on_device([model], CUDA, offload=True):
        assert model.weight.data_ptr() != weight.data_ptr()
        model.bias.data.add_(1.0)
    assert model.weight.data_ptr() == weight.data_ptr()
    assert torch.equal(model.bias, before + 1.0)
