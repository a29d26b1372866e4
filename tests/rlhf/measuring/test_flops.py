"""Compares FLOPs with torch's own count of the operations that ran, and with sums by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from rlhf.inputs.packing import PromptTree
from rlhf.measuring.flops import (
    ModelSize,
    Work,
    forward_flops,
    size_of,
    text_work,
    training_flops,
    update_flops,
    work_of,
)
from rlhf.models.adapters import empty_adapter
from rlhf.models.settings import LoraSettings
from tests.rlhf.every_architecture import tiny_config
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of, tiny_scalar_of

WITHOUT_ANGLES = 1e-3
"""Tolerance, since some versions of transformers make rotary angles by a small matrix product."""


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "opt"])
def test_a_pass_costs_what_torch_counts(architecture: str) -> None:
    """Without a mask torch counts the whole square of attention, and logits at every position."""
    length = 10
    policy = tiny_policy_of(architecture, attention="eager")
    with FlopCounterMode(display=False) as counter:
        policy(torch.arange(length)[None], use_cache=False).logits.sum().backward()
    found = 3 * forward_flops(size_of(policy), Work(length, length, length**2))
    assert found == pytest.approx(counter.get_total_flops(), rel=WITHOUT_ANGLES)


def test_a_scalar_model_has_no_unembedding() -> None:
    model = tiny_scalar_of("llama", attention="eager").classifier
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(6)[None], use_cache=False)
    found = forward_flops(size_of(model), Work(6, 6, 36))
    assert found == pytest.approx(counter.get_total_flops(), rel=WITHOUT_ANGLES)


def test_frozen_weights_get_no_gradient() -> None:
    """Below an adapter the gradient only passes through them.

    In the first layer it does not even do that, because nothing below its queries, keys and values
    learns.
    """
    length = 10
    policy = tiny_policy_of("llama", attention="eager")
    empty_adapter(policy, "unused", LoraSettings(rank=2))
    with FlopCounterMode(display=False) as counter:
        policy(torch.arange(length)[None], use_cache=False).logits.sum().backward()
    size = size_of(policy)
    first = policy.model.layers[0].self_attn
    unneeded = sum(
        weight.numel()
        for layer in (first.q_proj, first.k_proj, first.v_proj)
        for weight in (layer.base_layer.weight, layer.lora_A["default"].weight)
    )
    found = training_flops(size, Work(length, length, length**2)) - 2 * length * unneeded
    assert found == pytest.approx(counter.get_total_flops(), rel=WITHOUT_ANGLES)
    assert size.frozen_unembedding == size.unembedding


def test_weights_in_parts_count_whole() -> None:
    """ZeRO-3 leaves weights without data, with their shape in an attribute."""
    policy = tiny_policy_of("llama")
    whole = size_of(policy)
    for parameter in policy.parameters():
        parameter.ds_shape = parameter.shape
        parameter.data = torch.empty(0)
    assert size_of(policy) == whole


def test_a_tree_is_read_with_its_prompt_once() -> None:
    """The prompt has 3 tokens (1 + 2 + 3 pairs), the responses 2 (4 + 5) and 1 (4)."""
    tree = PromptTree((5, 6, 7), ((8, 9), (8,)))
    assert work_of([tree]) == Work(tokens=6, logits=3, pairs=19)
    assert work_of([tree, tree]) == Work(12, 6, 38)
    assert text_work(4) == work_of([PromptTree((1,), ((2, 3, 4),))]) == Work(4, 3, 10)


def test_phases_of_an_update() -> None:
    policy, value, reward = ModelSize(100, 50, 8), ModelSize(90, 0, 6), ModelSize(10, 0, 1)
    episodes, texts = Work(tokens=7, logits=4, pairs=20), Work(5, 4, 15)
    policy_pass = 2 * 100 * 7 + 2 * 50 * 4 + 4 * 8 * 20
    value_pass = 2 * 90 * 7 + 4 * 6 * 20
    phases = update_flops(policy, value, [reward, reward], episodes, texts, num_epochs=1.5)
    assert phases == {
        "rollout": policy_pass,
        "score": 2 * (2 * 10 * 7 + 4 * 1 * 20),
        "logprobs": policy_pass,
        "reference": policy_pass,
        "value": value_pass,
        "ptx": 3 * (2 * 100 * 5 + 2 * 50 * 4 + 4 * 8 * 15),
        "train": 3 * 1.5 * (policy_pass + value_pass),
    }
    taught = update_flops(policy, value, [reward, reward], episodes, texts, 1.5, is_taught=True)
    assert taught == phases | {"ptx": phases["ptx"] / 3 * 4}


def test_layers_may_have_heads_of_their_own() -> None:
    """Gemma 4 has four heads of 8 in the layer with a window, and four of 16 in the other."""
    made = byte_tokenizer("</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    config = tiny_config("gemma4_text", made)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert size_of(model).attention == 4 * 8 + 4 * 16
