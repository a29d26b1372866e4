"""A tiny Llama, written as GGUF by hand, must be read back as the same model."""

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from data.gguf import load_gguf
from rlhf.inputs.chat import Chat
from rlhf.models.empty import empty_policy
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from tests.rlhf.plain_loading import load_with_report
from tests.rlhf.tiny_models import tiny_policy_of

TOKENS = ["<unk>", "<bos>", "<end>", *"abcdefghij", "ab"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}<end>{% endfor %}"
HEADS, KV_HEADS = 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleave(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder rows: llama.cpp rotates neighbouring rows of a head, transformers its two halves."""
    size, width = weight.shape
    halves = weight.view(num_heads, 2, size // num_heads // 2, width)
    return halves.transpose(1, 2).reshape(size, width)


def write_gguf(
    model: LlamaForCausalLM, path: Path, quantization: gguf.GGMLQuantizationType
) -> None:
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // HEADS)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    for name, weight in tensors(model).items():
        kind = quantization if weight.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quantize(weight.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def tensors(model: LlamaForCausalLM) -> dict[str, Tensor]:
    weights = {
        "token_embd.weight": model.model.embed_tokens.weight,
        "output_norm.weight": model.model.norm.weight,
        "output.weight": model.lm_head.weight,
    }
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in NAMES.items():
            weight = layer.get_submodule(ours).weight
            if theirs in ("attn_q", "attn_k"):
                weight = interleave(weight, HEADS if theirs == "attn_q" else KV_HEADS)
            weights[f"blk.{number}.{theirs}.weight"] = weight
    return {name: weight.detach().contiguous() for name, weight in weights.items()}


@pytest.fixture
def source() -> LlamaForCausalLM:
    model = tiny_policy_of("llama", vocab_size=len(TOKENS), intermediate_size=64)
    assert isinstance(model, LlamaForCausalLM)
    return model


IDS = torch.tensor([[1, 3, 4, 5, 6, 13, 2, 7]])


@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [(gguf.GGMLQuantizationType.F32, 1e-5), (gguf.GGMLQuantizationType.Q8_0, 0.1)],
)
@torch.no_grad()
def test_a_gguf_file_is_the_model_it_was_made_from(
    tmp_path: Path,
    source: LlamaForCausalLM,
    quantization: gguf.GGMLQuantizationType,
    tolerance: float,
) -> None:
    write_gguf(source, tmp_path / "tiny.gguf", quantization)
    model, tokenizer = load_gguf(tmp_path / "tiny.gguf")
    expected = source(IDS).logits
    assert (model(IDS).logits - expected).abs().max() < tolerance * expected.abs().max()
    assert tokenizer("abc", add_special_tokens=False).input_ids == [13, 5]
    assert tokenizer.eos_token == "<end>"
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.pad_token_id != Chat(tokenizer).end_id


@torch.no_grad()
def test_what_was_loaded_is_saved_as_a_plain_folder(
    tmp_path: Path, source: LlamaForCausalLM
) -> None:
    write_gguf(source, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.Q8_0)
    model, tokenizer = load_gguf(tmp_path / "tiny.gguf")
    save_policy(model, tokenizer, tmp_path / "plain")
    assert "quantization" not in (tmp_path / "plain" / "config.json").read_text()
    again, report = load_with_report(AutoModelForCausalLM, tmp_path / "plain")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    torch.testing.assert_close(again(IDS).logits, model(IDS).logits, rtol=0, atol=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path / "plain")("abc").input_ids[-2:] == [13, 5]


def test_dtype_is_taken(tmp_path: Path, source: LlamaForCausalLM) -> None:
    write_gguf(source, tmp_path / "tiny.gguf", gguf.GGMLQuantizationType.F32)
    model, _ = load_gguf(tmp_path / "tiny.gguf", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_a_file_that_is_no_gguf_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML")
    with pytest.raises(ValueError, match=r"x\.gguf is not a GGUF file: it starts with b'GGML'"):
        load_gguf(tmp_path / "x.gguf")
    with pytest.raises(FileNotFoundError):
        load_gguf(tmp_path / "none.gguf")


@pytest.mark.parametrize("load", [load_policy, load_scalar, load_chat, empty_policy])
def test_the_loaders_refuse_the_file_and_name_the_command_that_converts(
    load: Callable[[ModelSettings], object], tmp_path: Path, source: LlamaForCausalLM
) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(source, path, gguf.GGMLQuantizationType.F32)
    command = f"python -m data.smollm2 --gguf {path} --base_dir FOLDER"
    with pytest.raises(ValueError, match=f"is a GGUF file, .*{command}"):
        load(ModelSettings(path=str(path)))
