"""Builds tiny models and tokenizers in code, with weights that make differences show."""

from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from rlhf.models.architectures import with_attention
from rlhf.models.full import disable_dropout
from rlhf.models.packed_attention import take_packed_rows
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import Attention

VOCAB = 61

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
_GEMMA3 = {
    **_LLAMA,
    "head_dim": 8,
    "sliding_window": 64,
    "layer_types": ["sliding_attention", "full_attention"],
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": {**_SIZES, "intermediate_size": 48},
    "phi": {**_SIZES, "intermediate_size": 48},
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 8},
    "opt": {**_SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
    "mistral": {**_LLAMA, "sliding_window": 64},
    "gemma2": {**_GEMMA3, "attn_logit_softcapping": None},
    "gemma3_text": _GEMMA3,
    "granite": _LLAMA,
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": 32,  # beyond the 20 tokens of the packing probe
        "max_position_embeddings": 64,
    },
}

_WITHOUT_SDPA = ("bloom", "mamba", "gpt_neo", "gemma2")


def tiny_policy_of(architecture: str, *, attention: Attention | None = None, **changes: Any) -> Any:
    """Make a causal LM of this architecture in evaluation mode; equal calls give equal weights."""
    return _tiny(AutoModelForCausalLM, architecture, attention, changes)


def tiny_scalar_of(
    architecture: str, *, attention: Attention | None = None, **changes: Any
) -> ScalarModel:
    """Make a scalar model of this architecture with a bias and a scale that are not trivial."""
    changes = {"num_labels": 1, **changes}
    classifier = _tiny(AutoModelForSequenceClassification, architecture, attention, changes)
    return ScalarModel(classifier, bias=0.3, scale=0.5)


def _tiny(
    auto_class: Any, architecture: str, attention: Attention | None, changes: dict[str, Any]
) -> PreTrainedModel:
    if attention is None:
        attention = "eager" if architecture in _WITHOUT_SDPA else "sdpa"
    settings = {
        "vocab_size": VOCAB,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        **ARCHITECTURES[architecture],
        **changes,
    }
    config = AutoConfig.for_model(architecture, **settings)
    model = with_attention(
        lambda name: auto_class.from_config(config, attn_implementation=name), attention
    )
    take_packed_rows(model, attention)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.1 * noise)
    return disable_dropout(model)


def change_trained(model: torch.nn.Module, seed: int = 1) -> None:
    """Add a little noise to every trained weight, because a new adapter changes nothing yet."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def byte_tokenizer(*special: str, **settings: Any) -> PreTrainedTokenizerBase:
    """Make a byte-level tokenizer without merges: the special tokens first, then 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings)
