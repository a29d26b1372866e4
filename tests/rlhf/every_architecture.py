"""Makes a tiny model of every decoder-only architecture of transformers from its default config.

Most fields are made small by their name, in nested configs too. A few architectures need settings
that fit each other, which `SETTINGS` has.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING,
    AutoConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rlhf.models.full import quiet_transformers

MODEL_TYPES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

CONTEXT = 256
VOCABULARY, LAYERS = -1, -2
"""Stand for the tokenizer's size, and for the number of layers that shows every kind of them."""
SHRUNK: list[tuple[str, int]] = [
    (r"vocab_size|vocab_size_per_layer_input|decoder_vocab_size", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_target_positions", CONTEXT),
    (r"(max_source_positions|model_max_length|context_length)", CONTEXT),
    (
        r"(swa_)?head_dim|dim_head|d_head|attention_head_(size|dim)|kv_channels|d_kv|swa_v_head_dim",
        8,
    ),
    (r"qk_head_dim", 16),
    (r"qk_nope_head_dim|qk_rope_head_dim|v_head_dim|rotary_dim|index_head_dim", 8),
    (r"(q|kv|o)_lora_rank", 16),
    (r"linear_(key_|value_)?head_dim|mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r"linear_num_(key|value)?_?heads|mamba_n_heads|mamba_num_heads", 4),
    (r"(mamba_d_state|ssm_state_size|state_size)", 4),
    (r"mamba_d_ssm", 32),
    (r"(mamba_)?n_?groups|mamba_n_groups|n_group|topk_group|num_expert_group|o_groups", 1),
    (r"n_mamba_heads", 2),
    (r"(mamba_)?chunk_size|mamba_chunk_size|mamba_dt_rank|time_step_rank", 8),
    (r"(swa_)?num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", 2),
    (r"(swa_)?num_attention_heads|n_heads?|num_heads|(encoder|decoder)_attention_heads", 4),
    (r"num_(encoder|decoder)_attention_heads|attention_heads|index_n_heads", 4),
    (r"num_hidden_layers|n_layers?|num_layers|(encoder|decoder)_layers|depth|num_blocks", LAYERS),
    (r"num_(encoder|decoder)_layers|num_global_layers", LAYERS),
    (r"(moe_|(input_|output_)?)(hidden_size|embedding_size|d_model)|n_embd|emb_dim|dim_model", 32),
    (r"lru_width|attention_hidden_size|word_embed_proj_dim|embedding_dim|hidden_size_global", 32),
    (r".*intermediate_size.*|ffn_(hidden_size|dim)|.*_ffn_dim|d_ff|dim_ff|dff|d_inner", 48),
    (r"feed_forward_size|expert_ffn_hidden_size|mlp_dim|ffn_hidden_size", 48),
    (r"num_(local_)?experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok(en)?|moe_top_?k|moe_k|moe_top_k", 2),
    (r"num_shared_experts|n_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"sliding_window(_size)?|attention_chunk_size|local_attention|attention_window_size", 64),
    (r"window_size|keep_window_size|floor_scale", 64),
    (r"index_topk|index_topk_blocks", 64),
    (r"num_kv_shared_layers|num_nextn_predict_layers|num_mtp_modules", 0),
]
_RULES = [(re.compile(name), size) for name, size in SHRUNK]
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "block_types", "indexer_types")
"""Fields that list kinds of layers. A tiny model has one layer of each kind."""

_NEEDED: dict[str, dict[str, Any]] = {
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
}
"""Arguments without which an architecture has no default config."""

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_HYBRID = ["linear_attention", "hybrid", "linear_attention", "hybrid"]
_ZAMBA = {
    "layers_block_type": _HYBRID,
    "num_hidden_layers": 4,
    "attention_head_dim": 16,
    "num_key_value_heads": 4,
    "attention_hidden_size": 64,
}
_DOTS3 = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 16,
    "swa_qk_nope_head_dim": 8,
    "swa_v_head_dim": 8,
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 100},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "emu3": {"vocabulary_map": {"<image>": 3}},
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [16, 16],
        "axial_pos_embds_dim": [16, 16],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {**_ZAMBA, "n_mamba_heads": 8},
}
"""Settings that an architecture needs beside the rules of `_shrink`."""


NOT_BUILT = {
    "gemma3n": "its class needs the package timm",
    "gemma4_assistant": "transformers 5.23 refuses the config that its own class makes",
    "gemma4_unified_assistant": "transformers 5.23 refuses the config that its own class makes",
}
"""Architectures whose class cannot be made, and why. Their folders hold a config and no weights."""


def save_tiny(
    model_type: str, tokenizer: PreTrainedTokenizerBase, folder: str | Path, **sizes: int
) -> None:
    """Write a model folder of this architecture with weights that make differences show."""
    with quiet_transformers():
        torch.manual_seed(0)
        config = tiny_config(model_type, tokenizer)
        config.update(sizes)
        tokenizer.save_pretrained(folder)
        if model_type in NOT_BUILT:
            config.save_pretrained(folder)
            save_file({}, Path(folder) / "model.safetensors")
            return
        model = _class_of(config)._from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim >= 2:
                    parameter.copy_(torch.randn(parameter.shape) * 0.2)
        model.save_pretrained(folder)


def _class_of(config: PretrainedConfig) -> Any:
    """Return the class of the models that people publish with this config.

    If the causal LM is a part of a model that reads or writes more than text, this is the class of
    the whole model.
    """
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if causal_class.config_class is not type(config):
        for mapping in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_TEXT_TO_WAVEFORM_MAPPING):
            if type(config) in mapping:
                return mapping[type(config)]
    return causal_class


def tiny_config(model_type: str, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Return the default config of an architecture with every size small."""
    config_class = type(AutoConfig.for_model(model_type, **_NEEDED.get(model_type, {})))
    default = config_class(**_NEEDED.get(model_type, {})).to_dict()
    changed = _shrink(default, tokenizer)
    for name, value in SETTINGS.get(model_type, {}).items():
        if isinstance(value, dict) and isinstance(changed.get(name), dict):
            changed[name] |= value
        else:
            changed[name] = value
    return config_class(**changed)


def _shrink(fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the fields to set, those of nested configs too; the others keep their default."""
    found = {name: fields[name] for name in KINDS if isinstance(fields.get(name), list)}
    num_layers = max([2, *(len(set(kinds)) for kinds in found.values())])
    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if name in found:
            kinds = list(dict.fromkeys(value))
            changed[name] = kinds + [kinds[-1]] * (num_layers - len(kinds))
        elif name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            changed[name] = getattr(tokenizer, name)
        elif name == "per_layer_config":
            continue  # It lists more layers than the tiny model has; the class makes it anew.
        elif isinstance(value, dict) and name.endswith(("config", "decoder", "encoder")):
            changed[name] = _shrink(value, tokenizer)
            if "model_type" in value:
                changed[name]["model_type"] = value["model_type"]
        elif isinstance(value, int) and not isinstance(value, bool):
            size = next((size for pattern, size in _RULES if pattern.fullmatch(name)), None)
            if size is not None:
                size = (
                    num_layers if size == LAYERS else len(tokenizer) if size == VOCABULARY else size
                )
                changed[name] = min(value, size)
    if "kv_lora_rank" in fields and "num_key_value_heads" in changed:
        changed["num_key_value_heads"] = changed["num_attention_heads"]  # as in the default
    return changed
