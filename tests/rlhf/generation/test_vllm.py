"""Tests the engine vllm on a stand-in for the module, which needs no GPU."""

import math
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

import rlhf.generation.vllm
from rlhf.generation.engines import check_can_sample_alone, generate, make_engine
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.generation.vllm import full_weights
from rlhf.training.nonfinite import NonFiniteError
from tests.rlhf.generation.fake_vllm import (
    INTERFACE,
    FakeLLM,
    cuda_autocast,
    of_class,
    vllm_installed,
)
from tests.rlhf.tiny_models import tiny_policy_of

SETTINGS = GenerationSettings(engine="vllm", batch_size=5, vllm_memory_share=0.4)
PROMPTS = [[5, 6, 7], [30, 8, 9, 12, 11], [5, 6, 7]]
DECODING = Decoding(end_id=7, max_new_tokens=16, temperature=1.0)


@pytest.fixture(autouse=True)
def vllm() -> Iterator[None]:
    with vllm_installed():
        yield


def sharper(policy: Any) -> Any:
    with torch.no_grad():
        policy.lm_head.weight.mul_(2.0)
    return policy


def test_one_start_and_one_refresh_a_call_with_the_weights_of_that_moment() -> None:
    policy = tiny_policy_of("llama")
    for changed in (policy, sharper(policy)):
        samples = generate(changed, PROMPTS, SETTINGS, replace(DECODING, temperature=0))
        expected = generate(
            changed, PROMPTS, GenerationSettings(), replace(DECODING, temperature=0)
        )
        assert samples.responses == expected.responses
        for nats, right in zip(samples.logprobs, expected.logprobs, strict=True):
            assert nats == pytest.approx(right, abs=1e-5)
    [llm] = FakeLLM.started
    awake = ["refresh", "reset", "generate", "sleep"]
    assert llm.calls == [*awake, "wake weights", "refresh", "wake kv_cache", *awake[1:]]


def test_released_it_sleeps_until_the_next_refresh() -> None:
    engine, policy = make_engine(SETTINGS), tiny_policy_of("llama")
    engine.release()  # nothing was started
    for changed in (policy, sharper(policy)):
        engine.refresh(changed)
        greedy = replace(DECODING, temperature=0)
        expected = generate(changed, PROMPTS, GenerationSettings(), greedy)
        assert engine.generate(PROMPTS, greedy).responses == expected.responses
        engine.release()
        engine.release()
    engine.refresh(policy)
    [llm] = FakeLLM.started
    once = ["refresh", "reset", "generate", "sleep"]
    assert llm.calls == [*once, *(wake := ["wake weights", "refresh", "wake kv_cache", "reset"]),
                         "generate", "sleep", *wake]  # fmt: skip


def test_the_stand_in_refuses_what_vllm_does_not_take() -> None:
    with pytest.raises(TypeError, match="EngineArgs has no max_sequences"):
        FakeLLM(model="unread", max_sequences=3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tag'"):
        INTERFACE.bind("wake_up", tag=["weights"])
    with pytest.raises(TypeError, match="SamplingParams has no max_new_tokens"):
        of_class("SamplingParams", max_new_tokens=3)


def test_settings_that_vllm_starts_with() -> None:
    make_engine(SETTINGS).refresh(tiny_policy_of("llama"))
    arguments = FakeLLM.started[0].arguments
    assert arguments["max_num_seqs"] == 5
    assert arguments["gpu_memory_utilization"] == 0.4
    assert arguments["dtype"] == torch.float32
    assert arguments["generation_config"] == "vllm"  # no top-k from the model's folder
    assert arguments["logprobs_mode"] == "processed_logprobs"
    rlhf.generation.engines._vllm_of_process.cache_clear()
    with cuda_autocast(torch.bfloat16):
        generate(tiny_policy_of("llama"), PROMPTS, SETTINGS, DECODING)
    assert FakeLLM.started[1].arguments["dtype"] == torch.bfloat16


def test_the_generator_seeds_each_call_and_the_global_draws_stay_as_they_were() -> None:
    policy = tiny_policy_of("llama")

    def sample(seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return generate(policy, PROMPTS, SETTINGS, DECODING, generator).responses

    torch.manual_seed(5)
    np.random.seed(5)
    expected = float(torch.rand(())), float(np.random.rand())
    first = sample(0)
    assert first[0] != first[2]  # the same prompt
    torch.manual_seed(5)
    np.random.seed(5)
    assert sample(0) == first != sample(1)
    assert (float(torch.rand(())), float(np.random.rand())) == expected


def test_lora_layers_give_the_weights_of_the_model_that_they_make() -> None:
    for architecture, targets in (("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn"])):
        policy, plain = tiny_policy_of(architecture), tiny_policy_of(architecture)
        is_transposed = architecture == "gpt2"  # whose Conv1D holds the transpose
        policy.add_adapter(
            LoraConfig(r=2, lora_alpha=6, target_modules=targets, fan_in_fan_out=is_transposed)
        )
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                if ".lora_B" in name:
                    torch.nn.init.normal_(parameter)
        plain.load_state_dict(dict(full_weights(policy)), strict=False)
        assert [n for n, _ in full_weights(policy)] == [n for n, _ in plain.named_parameters()]
        ids = torch.tensor([PROMPTS[1]])
        difference = policy(input_ids=ids).logits - plain(input_ids=ids).logits
        assert difference.abs().max() < 1e-4
        untouched = tiny_policy_of(architecture)
        policy.disable_adapters()
        for (_, weight), base in zip(full_weights(policy), untouched.parameters(), strict=True):
            assert torch.equal(weight, base)
        policy.enable_adapters()
        assert (policy(input_ids=ids).logits - untouched(input_ids=ids).logits).abs().max() > 0.1


def test_one_weight_is_gathered_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A LoRA layer's comes with its factors, and an embedding that is also the head comes once."""
    policy = tiny_policy_of("llama", tie_word_embeddings=True, num_hidden_layers=1)
    policy.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    groups: list[list[str]] = []
    held: list[str] = []

    @contextmanager
    def noted(model: Any, names: list[str], dtype: torch.dtype) -> Iterator[None]:
        assert model is policy and dtype == torch.bfloat16 and not held
        groups.append(names)
        held.extend(names)
        yield
        held.clear()

    monkeypatch.setattr(rlhf.generation.vllm, "gathered", noted)
    with cuda_autocast(torch.bfloat16):
        make_engine(SETTINGS).refresh(policy)
    assert not held
    names = [name for name, _ in FakeLLM.started[0].model.named_parameters()]
    assert "lm_head.weight" not in names
    layer = "model.layers.0.self_attn.q_proj"
    parts = [
        f"{layer}.{part}.weight" for part in ("base_layer", "lora_A.default", "lora_B.default")
    ]
    assert groups == [parts if name == f"{layer}.weight" else [name] for name in names]


def test_no_weight_lives_on_while_the_next_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy_of("llama", num_hidden_layers=1)
    policy.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    given: list[weakref.ref[Any]] = []
    alive: list[int] = []

    @contextmanager
    def noted(*_: Any) -> Iterator[None]:
        alive.append(sum(one() is not None for one in given))
        yield

    monkeypatch.setattr(rlhf.generation.vllm, "gathered", noted)
    weights = full_weights(policy)
    while (pair := next(weights, None)) is not None:
        given.append(weakref.ref(pair[1]))
        del pair
    assert len(given) == len(alive) > 10 and set(alive) == {0}


def test_logits_that_are_no_numbers_are_refused() -> None:
    policy = tiny_policy_of("llama")
    engine = make_engine(SETTINGS)
    engine.refresh(policy)
    respond = FakeLLM.started[0]._respond

    def spoilt(request: Any, sampling: Any) -> Any:
        answer = respond(request, sampling)
        next(iter(answer.outputs[0].logprobs[0].values())).logprob = math.nan
        return answer

    FakeLLM.started[0]._respond = spoilt
    with pytest.raises(NonFiniteError, match="logits is not finite in phase rollout"):
        engine.generate(PROMPTS, DECODING)


def test_a_model_of_another_shape_is_refused() -> None:
    generate(tiny_policy_of("llama"), PROMPTS, SETTINGS, DECODING)
    with pytest.raises(ValueError, match="models of one shape in a process"):
        generate(tiny_policy_of("llama", num_hidden_layers=1), PROMPTS, SETTINGS, DECODING)


def test_without_vllm_the_message_holds_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ValueError, match=r"not installed; pip install 'instruct-rlhf\[vllm\]'"):
        make_engine(SETTINGS)


def test_it_is_refused_where_only_the_first_process_samples() -> None:
    with pytest.raises(ValueError, match=r"all 2 processes must start together, .*choose hf"):
        check_can_sample_alone(SETTINGS, 2)
    check_can_sample_alone(SETTINGS, 1)
    check_can_sample_alone(GenerationSettings(), 2)


def test_without_a_gpu_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU that it could use; choose hf"):
        make_engine(SETTINGS)
