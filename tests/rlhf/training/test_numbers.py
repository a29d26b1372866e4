"""Tests `to_floats`; tests/device/on_pretend.py counts how often the host waits in it."""

import pytest
import torch

from rlhf.training.numbers import to_floats


def test_numbers_keep_their_order_and_every_bit() -> None:
    third = torch.tensor(1 / 3)
    tiny = torch.tensor([1e-300], dtype=torch.float64)
    values: list[torch.Tensor | float] = [torch.tensor(7), 2.5, third, tiny, 3]
    assert to_floats(values) == [7.0, 2.5, third.item(), 1e-300, 3.0]
    assert to_floats([]) == []


def test_a_tensor_of_several_numbers_is_refused() -> None:
    with pytest.raises((RuntimeError, ValueError)):
        to_floats([torch.ones(2)])
