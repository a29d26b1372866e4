"""Files say the same in version 4's names, and version 5 reads the same from them as before."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rlhf.models.interop import add_version_4_names
from rlhf.models.saving import save_policy
from tests.rlhf.every_architecture import MODEL_TYPES, tiny_config
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

PLAIN = {"rope_type": "default", "rope_theta": 5e4}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
ROPE = ("rope_parameters", "partial_rotary_factor", "layer_types")
"""Settings that an old name could change."""


@pytest.mark.parametrize(
    ("architecture", "rope", "expected"),
    [
        ("llama", PLAIN, {"rope_theta": 5e4, "rope_scaling": None}),
        ("qwen3", {**LLAMA3, "rope_theta": 5e4}, {"rope_theta": 5e4, "rope_scaling": LLAMA3}),
        (
            "phi",
            {**PLAIN, "partial_rotary_factor": 0.25},
            {"rope_theta": 5e4, "partial_rotary_factor": 0.25, "rope_scaling": None},
        ),
        (
            "gpt_neox",
            {**PLAIN, "partial_rotary_factor": 0.5},
            {"rotary_emb_base": 5e4, "rotary_pct": 0.5, "rope_scaling": None},
        ),
        (
            "gemma3_text",
            {
                "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
                "full_attention": {**LINEAR, "rope_theta": 5e4},
            },
            {"rope_theta": 5e4, "rope_local_base_freq": 3e3, "rope_scaling": LINEAR},
        ),
    ],
)
def test_rotary_settings_have_both_names(
    architecture: str, rope: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer("</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    policy = tiny_policy_of(architecture, vocab_size=len(tokenizer), rope_parameters=rope)
    save_policy(policy, tokenizer, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in expected} == expected
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa").eval()
    assert again.config.rope_parameters == policy.config.rope_parameters
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, policy(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.slow
def test_every_architectures_config_is_read_as_it_was(model_type: str, tmp_path: Path) -> None:
    """This includes layers with rotary bases of their own, for which version 4 has no name."""
    tokenizer = byte_tokenizer("</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    try:
        config = tiny_config(model_type, tokenizer)
        config.save_pretrained(tmp_path)
        before = type(config).from_pretrained(tmp_path).to_dict()
    except Exception as error:
        pytest.skip(f"no tiny config: {error}")
    add_version_4_names(tmp_path)
    after = type(config).from_pretrained(tmp_path).to_dict()
    assert {name: after[name] for name in before if name in ROPE} == {
        name: before[name] for name in before if name in ROPE
    }


def test_configs_inside_a_config_have_both_names_too(tmp_path: Path) -> None:
    inner = {"model_type": "llama", "rope_parameters": PLAIN}
    outer = {"model_type": "llava", "text_config": inner, "vision_config": {"model_type": "clip"}}
    (tmp_path / "config.json").write_text(json.dumps(outer))
    add_version_4_names(tmp_path)
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["text_config"] == {**inner, "rope_theta": 5e4, "rope_scaling": None}
    assert found["vision_config"] == outer["vision_config"] and "rope_theta" not in found
    assert AutoConfig.from_pretrained(tmp_path).text_config.rope_parameters == PLAIN


def test_the_tokenizer_has_a_class_and_tokens_that_both_know(tmp_path: Path) -> None:
    special = {"eos_token": "</s>", "pad_token": "<pad>", "image_token": "<image>"}
    tokenizer = byte_tokenizer(
        "</s>", "<pad>", "<tool>", "<image>", extra_special_tokens=["<tool>"], **special
    )
    tokenizer.save_pretrained(tmp_path)
    plain = AutoTokenizer.from_pretrained(tmp_path)
    add_version_4_names(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<tool>"]
    assert not isinstance(config.get("extra_special_tokens"), list)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(plain)
    assert again.all_special_tokens == plain.all_special_tokens
    assert again.extra_special_tokens == ["<tool>"]
    text = "<tool> a b</s>"
    assert again(text).input_ids == plain(text).input_ids


@pytest.mark.parametrize("is_spaced", [True, False])
def test_the_space_before_a_text_is_told_twice(is_spaced: bool, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=is_spaced)
    tokenizer.backend_tokenizer.pre_tokenizer = splitter
    tokenizer.save_pretrained(tmp_path)
    add_version_4_names(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_prefix_space"] is is_spaced
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("ab").input_ids == tokenizer("ab").input_ids
    assert len(again("ab").input_ids) == 2 + is_spaced
