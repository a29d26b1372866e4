"""Linear layers that are transposed for a few rows compute the same as before."""

import pytest
import torch
from torch import Tensor, nn

from rlhf.generation import cpu_products
from rlhf.generation.cpu_products import TRANSPOSED_ROWS, transposed_linear_layers
from rlhf.generation.engines import make_engine
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from tests.rlhf.tiny_models import tiny_policy_of


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1,), (4, 1), (16, 1), (5, 3), (TRANSPOSED_ROWS.stop,), (50,)])
def test_same_products(two_threads: None, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias=bias)
    x = torch.randn(*shape, 24)
    expected = layer(x)
    with transposed_linear_layers(layer):
        found = layer(x)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_only_the_rows_that_gain_are_turned(two_threads: None) -> None:
    layer = nn.Linear(8, 8)
    seen: list[int] = []

    def noted(x: Tensor, *_: object) -> Tensor:
        seen.append(len(x))
        return x

    with (
        transposed_linear_layers(layer),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(nn.functional, "linear", noted)
        for rows in (
            1,
            TRANSPOSED_ROWS[0] - 1,
            TRANSPOSED_ROWS[0],
            TRANSPOSED_ROWS[-1],
            TRANSPOSED_ROWS[-1] + 1,
            512,
        ):
            layer(torch.zeros(rows, 8))
    assert seen == [1, TRANSPOSED_ROWS[0] - 1, TRANSPOSED_ROWS[-1] + 1, 512]


def test_layers_are_as_before_whatever_happens(two_threads: None) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8).bfloat16(), nn.ReLU(), nn.Linear(8, 8))
    wrapped = model[3].forward = lambda x: x  # as an accelerator's wrapper does
    with pytest.raises(KeyError), transposed_linear_layers(model):
        assert ["forward" in vars(layer) for layer in model] == [True, False, False, True]
        raise KeyError
    assert ["forward" in vars(layer) for layer in model] == [False, False, False, True]
    assert model[3].forward is wrapped


def test_one_thread_turns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    layer = nn.Linear(8, 8)
    with transposed_linear_layers(layer):
        assert "forward" not in vars(layer)


@pytest.mark.parametrize("architecture", ["llama", "gpt_neox", "opt"])
def test_decoding_takes_the_same_tokens(monkeypatch: pytest.MonkeyPatch, architecture: str) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    engine = make_engine(GenerationSettings(batch_size=8))
    engine.refresh(tiny_policy_of(architecture))
    prompts = [[3 + i] * (1 + i % 3) for i in range(8)]
    decoding = Decoding(end_id=1, max_new_tokens=12, temperature=0)
    plain = engine.generate(prompts, decoding)
    turned_rows: list[int] = []

    def linear(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        turned_rows.append(len(x))
        return multiply(layer, x)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    multiply = cpu_products._linear
    monkeypatch.setattr(cpu_products, "_linear", linear)
    turned = engine.generate(prompts, decoding)
    assert turned_rows.count(8) >= 11
    assert turned.responses == plain.responses
