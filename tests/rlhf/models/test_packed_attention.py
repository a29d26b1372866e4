"""Our attention has names of its own, and replaces nothing in transformers.

With a block mask it computes the same as with a dense mask, by torch's FlexAttention or without.
"""

import functools
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.inputs.packing import Layout, ModelInput, PackedRow, Packer, PromptTree
from rlhf.models import compat, packed_attention
from rlhf.models.compat import attention_of
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_policy
from rlhf.models.packed_attention import PACKED_FLEX, PACKED_SDPA, take_packed_rows
from rlhf.models.passes import compute_scores
from rlhf.models.settings import ModelSettings
from tests.rlhf.tiny_models import tiny_policy_of, tiny_scalar_of

SPARSE = DeepseekV32Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=32,
    moe_intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    index_n_heads=2,
    index_head_dim=16,
    index_topk=4,
)


def test_transformers_own_sdpa_stays_in_its_place() -> None:
    assert packer_for(tiny_policy_of("llama"), 64).layout == Layout.SEGMENTS
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_the_name_changes_no_bit_and_is_not_saved(architecture: str, tmp_path: Path) -> None:
    policy = tiny_policy_of(architecture)
    ids = torch.arange(3, 20)[None]
    assert attention_of(policy) == PACKED_SDPA
    with torch.no_grad():
        ours = policy(ids).logits
        policy.set_attn_implementation("sdpa")
        assert torch.equal(policy(ids).logits, ours)
        take_packed_rows(policy, "sdpa")
    policy.save_pretrained(tmp_path)
    assert PACKED_SDPA not in (tmp_path / "config.json").read_text()
    assert "sdpa" not in json.loads((tmp_path / "config.json").read_text()).values()


def test_a_model_that_asks_for_sdpa_by_name_keeps_it() -> None:
    """Under our name the model would leave out its sparse mask, and tokens would see all others."""
    torch.manual_seed(0)
    policy = DeepseekV32ForCausalLM(SPARSE).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        sparse = policy(ids).logits
        take_packed_rows(policy, "sdpa")
        assert attention_of(policy) == "sdpa"
        assert torch.equal(policy(ids).logits, sparse)
        # Sparse and whole attention differ here, so the test can fail.
        AttentionInterface.register("another_name", sdpa_attention_forward)
        AttentionMaskInterface.register("another_name", sdpa_mask)
        policy.set_attn_implementation("another_name")
        assert not torch.allclose(policy(ids).logits, sparse, atol=1e-4)


def test_another_attention_is_left_alone() -> None:
    policy = tiny_policy_of("llama", attention="eager")
    take_packed_rows(policy, "sdpa")
    assert attention_of(policy) == "eager"


def test_flex_attention_has_its_own_name_too(tmp_path: Path) -> None:
    policy = tiny_policy_of("llama", attention="flex_attention")
    assert attention_of(policy) == PACKED_FLEX
    policy.save_pretrained(tmp_path)
    assert "flex" not in (tmp_path / "config.json").read_text()
    loaded = load_policy(ModelSettings(path=str(tmp_path), attention="flex_attention"))
    assert attention_of(loaded) == PACKED_FLEX
    assert packer_for(loaded, 64).layout == Layout.BLOCKS
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, tiny_policy_of("llama")(ids).logits)


def test_flex_attention_is_refused_by_name_where_it_cannot_be(tmp_path: Path) -> None:
    bloom = tiny_policy_of("bloom")
    bloom.save_pretrained(tmp_path)
    told = "cannot load .*attention is flex_attention.*no sdpa; set attention to sdpa"
    with pytest.raises(ValueError, match=told):
        load_policy(ModelSettings(path=str(tmp_path), attention="flex_attention"))
    told = "flex_attention, and DeepseekV32ForCausalLM has an attention of its own.*set attention"
    with pytest.raises(ValueError, match=told):
        take_packed_rows(DeepseekV32ForCausalLM(SPARSE), "flex_attention")


def test_probe_says_why_flex_attention_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy_of("llama", attention="flex_attention")
    forward = policy.model.forward
    monkeypatch.setattr(
        policy.model,
        "forward",
        lambda attention_mask=None, **inputs: forward(attention_mask=None, **inputs),
    )
    told = r"with attention flex_attention: packed passes differ by \d.*; set attention to sdpa"
    with pytest.raises(ValueError, match=told):
        packer_for(policy, 64)


def test_a_model_without_the_setting_reads_block_masks_too() -> None:
    """PPO packs rows once for two models, which may have different settings."""
    scalar = tiny_scalar_of("llama")
    trees = [PromptTree((5, 6, 7), ((8, 9), (10,))), PromptTree((11,), ((12, 13),))]
    found, expected = (
        compute_scores(scalar, trees, Packer(64, layout=layout))
        for layout in (Layout.BLOCKS, Layout.ALONE)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def long_row(longest: int = 280) -> PackedRow:
    """Make a row whose mask allows some blocks wholly, some in part and some not at all."""
    ids = tuple(range(1, 301))
    trees = [
        PromptTree(ids[:longest], (ids[:40], ids[:90])),
        PromptTree(ids[:20], (ids[:30],)),
        PromptTree(ids[:100], (ids[:3], ids[:70])),
    ]
    (row,) = Packer(1000, layout=Layout.BLOCKS).rows(trees)
    assert row.blocks is not None and row.blocks.unique().tolist() == [0, 1, 2]
    return row


class Layer:
    """Has six heads of queries over two of keys, and random inputs (1, heads, length, 16)."""

    def __init__(self, length: int, size: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(1, heads, length, size) for heads in (6, 2, 2)]
        self.inputs = [torch.randn(shape, generator=generator) for shape in shapes]
        self.weights = torch.randn((1, length, 6, size), generator=generator)
        self.module = nn.Module()
        self.module.num_key_value_groups = 3  # type: ignore[assignment]  # as transformers has it
        self.module.is_causal = True  # type: ignore[assignment]

    def output(self, mask: ModelInput, softcap: float | None = None) -> Tensor:
        query, key, value = self.inputs
        output, _ = packed_attention.packed_attention(
            self.module, query, key, value, mask, scaling=0.3, softcap=softcap
        )
        return output

    def output_and_gradients(self, mask: ModelInput) -> list[Tensor]:
        for one in self.inputs:
            one.requires_grad_().grad = None
        output = self.output(mask)
        (output * self.weights).sum().backward()
        gradients = [one.grad for one in self.inputs if one.grad is not None]
        assert len(gradients) == 3
        return [output.detach(), *gradients]


def test_blocks_give_the_results_and_gradients_of_a_dense_mask() -> None:
    row = long_row()
    layer = Layer(len(row.tree))
    found, expected = map(layer.output_and_gradients, (row.block_mask, row.attention_mask))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Use FlexAttention on the CPU as on a GPU, with a fresh cache of what is compiled."""

    def by_kernel(_: nn.Module, *arguments: Any) -> Tensor:
        return packed_attention._by_kernel(*arguments)

    monkeypatch.setattr(packed_attention, "_by_rows_of_blocks", by_kernel)
    compat._compiled_flex.cache_clear()
    torch._dynamo.reset()
    yield
    compat._compiled_flex.cache_clear()
    torch._dynamo.reset()


def test_torchs_own_attention_gives_them_too(
    by_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not compiled, and gives gradients. On a CPU torch has it, but refuses to start it."""
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *_: None)
    monkeypatch.setattr(packed_attention, "compiled_flex_attention", compat.flex_attention)
    row = long_row()
    layer = Layer(len(row.tree))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        found = layer.output_and_gradients(row.block_mask)
    expected = layer.output_and_gradients(row.attention_mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_rows_of_all_lengths_share_one_kernel_and_too_many_are_an_error(
    by_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(compat, "MAX_FLEX_KERNELS", 1)
    for longest in (280, 281, 300):
        row = long_row(longest)
        layer = Layer(len(row.tree))
        dense = layer.output(row.attention_mask)
        torch.testing.assert_close(layer.output(row.block_mask), dense, rtol=0, atol=1e-5)
    assert counter.frame_count == 1
    with pytest.raises(ValueError, match="cannot compile a kernel for attention flex_attention"):
        Layer(len(row.tree), size=32).output(row.block_mask)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler")
@torch.no_grad()
def test_compiled_attention_equals_a_dense_mask(by_torch: None) -> None:
    """The test has no backward pass, since torch's kernel has no gradient on CPUs."""
    for longest in (280, 300):
        row = long_row(longest)
        layer = Layer(len(row.tree))
        dense = layer.output(row.attention_mask)
        torch.testing.assert_close(layer.output(row.block_mask), dense, rtol=0, atol=1e-5)


def test_what_a_block_mask_cannot_express_is_refused() -> None:
    row = long_row()
    with pytest.raises(ValueError, match="no place for softcap"):
        Layer(len(row.tree)).output(row.block_mask, softcap=50.0)
