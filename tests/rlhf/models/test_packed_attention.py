"""Our attention has a name of its own: nothing of transformers' is replaced or written."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rlhf.inputs.packing import Layout
from rlhf.models.compat import attention_of
from rlhf.models.layout import packer_for
from rlhf.models.packed_attention import PACKED_SDPA, take_segments
from tests.rlhf.tiny_models import tiny_policy_of

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
        take_segments(policy)
    policy.save_pretrained(tmp_path)
    assert PACKED_SDPA not in (tmp_path / "config.json").read_text()
    assert "sdpa" not in json.loads((tmp_path / "config.json").read_text()).values()


def test_a_model_that_asks_for_sdpa_by_name_keeps_it() -> None:
    """Under our name its sparse mask would be left out, and every token would see all others."""
    torch.manual_seed(0)
    policy = DeepseekV32ForCausalLM(SPARSE).eval()
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        sparse = policy(ids).logits
        take_segments(policy)
        assert attention_of(policy) == "sdpa"
        assert torch.equal(policy(ids).logits, sparse)
        # What the guard is for: sparse and whole attention differ here.
        AttentionInterface.register("another_name", sdpa_attention_forward)
        AttentionMaskInterface.register("another_name", sdpa_mask)
        policy.set_attn_implementation("another_name")
        assert not torch.allclose(policy(ids).logits, sparse, atol=1e-4)


def test_another_attention_is_left_alone() -> None:
    policy = tiny_policy_of("llama", attention="eager")
    take_segments(policy)
    assert attention_of(policy) == "eager"
