"""Weights are in bf16 while a policy samples, and as before afterwards."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from rlhf.generation.engines import generate
from rlhf.generation.half_weights import half_weights
from rlhf.generation.interface import Decoding, Samples
from rlhf.generation.settings import GenerationSettings
from tests.rlhf.tiny_models import tiny_policy_of

PROMPTS = [[5, 6, 7], [30, 8, 9, 12, 11], [5, 6, 7]]
DECODING = Decoding(end_id=7, max_new_tokens=12, temperature=1.0)


def autocast(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def dtypes(model: nn.Module) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def places(model: nn.Module) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]


def test_the_weights_come_back_to_the_bit_even_after_an_error() -> None:
    policy = tiny_policy_of("llama")
    before, expected = places(policy), deepcopy(policy.state_dict())
    with pytest.raises(KeyError), autocast(), half_weights(policy):
        assert dtypes(policy) == {torch.bfloat16}
        assert not torch.is_autocast_enabled("cpu")
        raise KeyError
    assert places(policy) == before and dtypes(policy) == {torch.float32}
    assert all(value.equal(expected[name]) for name, value in policy.state_dict().items())


def test_the_cache_holds_bf16() -> None:
    policy = tiny_policy_of("llama")
    cache = DynamicCache(config=policy.config)
    with torch.no_grad(), autocast(), half_weights(policy):
        policy(input_ids=torch.tensor([PROMPTS[1]]), past_key_values=cache, use_cache=True)
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    assert len(layers) == len(cache.layers) > 0
    held = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
    assert {None if tensor is None else tensor.dtype for tensor in held} == {torch.bfloat16}


def test_the_trained_parameters_and_their_hooks_stay() -> None:
    """DistributedDataParallel hangs its hooks on the parameters' gradient accumulators."""
    policy = tiny_policy_of("llama", tie_word_embeddings=True)
    before = list(policy.parameters())
    called: list[int] = []
    nodes = [parameter.view_as(parameter).grad_fn.next_functions[0][0] for parameter in before]
    for number, node in enumerate(nodes):
        node.register_hook(lambda *_, n=number: called.append(n))
    with autocast(), half_weights(policy):
        assert policy.lm_head.weight is policy.get_input_embeddings().weight
        assert not any(parameter.requires_grad for parameter in policy.parameters())
    assert all(now is then for now, then in zip(policy.parameters(), before, strict=True))
    policy(input_ids=torch.tensor([PROMPTS[1]])).logits.sum().backward()
    assert sorted(called) == list(range(len(before)))


@pytest.mark.parametrize("has_adapter", [False, True])
def test_sampling_under_autocast_is_sampling_from_the_model_in_bf16(has_adapter: bool) -> None:
    policy = tiny_policy_of("llama")
    if has_adapter:
        policy.add_adapter(LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        for name, parameter in policy.named_parameters():
            if ".lora_B" in name:
                nn.init.normal_(parameter)
    half = deepcopy(policy)
    for parameter in half.parameters():  # half.bfloat16() would round buffers too
        parameter.data = parameter.data.bfloat16()
    settings = GenerationSettings()

    def draw(model: PreTrainedModel) -> Samples:
        return generate(model, PROMPTS, settings, DECODING, torch.Generator().manual_seed(3))

    in_full = draw(policy)
    with autocast():
        assert draw(policy) == draw(half) != in_full
    assert draw(policy) == in_full


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_without_bf16_nothing_changes(dtype: torch.dtype | None) -> None:
    policy = tiny_policy_of("llama")
    with torch.autocast("cpu", dtype, enabled=dtype is not None), half_weights(policy):
        assert dtypes(policy) == {torch.float32}
        assert torch.is_autocast_enabled("cpu") == (dtype is not None)


def test_what_a_models_code_keeps_in_full_stays() -> None:
    policy = tiny_policy_of("llama")
    policy._keep_in_fp32_modules_strict = {"norm"}
    with autocast(), half_weights(policy):
        kept = {n for n, p in policy.named_parameters() if p.dtype == torch.float32}
    assert kept == {name for name, _ in policy.named_parameters() if "norm" in name} != set()
