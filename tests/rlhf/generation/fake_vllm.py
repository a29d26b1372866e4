"""A stand-in for the module vllm, which needs neither vLLM nor a GPU."""

import functools
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import rlhf.generation.engines
from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.generation.vllm import SINGLE_PROCESS_VARIABLES
from tests.rlhf.generation.vllm_interface import Interface

INTERFACE = Interface.load()


def takes_what_vllm_takes(method: Any) -> Any:
    """Refuse arguments that the method of this name in vLLM would not take."""

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        INTERFACE.bind(method.__name__, *args, **kwargs)
        return method(self, *args, **kwargs)

    return checked


def of_class(name: str, **values: Any) -> SimpleNamespace:
    """Hold these values, which must be fields of the class in vLLM."""
    INTERFACE.check_fields(name, values)
    return SimpleNamespace(**values)


class FakeLLM:
    """Does what the engine uses of vllm.LLM, with a model of transformers made from the folder.

    It draws from the global generator, as vLLM does for requests without a seed. Asleep it has no
    weights, and it refuses to sample.
    """

    started: ClassVar[list[Any]]

    @takes_what_vllm_takes
    def __init__(self, *, model: str, **arguments: Any) -> None:
        assert not torch.is_autocast_enabled("cuda")
        self.arguments = arguments
        self.asleep: set[str] = set()
        self.calls: list[str] = []
        config = AutoConfig.from_pretrained(model)
        assert config.architectures == ["LlamaForCausalLM"]
        self.model = AutoModelForCausalLM.from_config(config).eval()
        self.model.load_weights = self._load_weights
        self.started.append(self)

    @torch.no_grad()
    def _load_weights(self, weights: Any) -> None:
        """Copy each weight before the next is asked for, as vLLM's models do."""
        own = self.model.named_parameters()
        for (name, weight), (own_name, parameter) in zip(weights, own, strict=True):
            assert (name, weight.shape) == (own_name, parameter.shape)
            parameter.copy_(weight)

    @takes_what_vllm_takes
    def apply_model(self, func: Any) -> None:
        assert "weights" not in self.asleep
        self.calls.append("refresh")
        func(self.model)

    @takes_what_vllm_takes
    def reset_prefix_cache(self) -> None:
        self.calls.append("reset")

    @takes_what_vllm_takes
    def sleep(self, level: int) -> None:
        assert level == 2 and self.arguments["enable_sleep_mode"] and not self.asleep
        self.calls.append("sleep")
        self.asleep = {"weights", "kv_cache"}
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.fill_(math.nan)

    @takes_what_vllm_takes
    def wake_up(self, tags: list[str]) -> None:
        assert self.asleep.issuperset(tags)
        self.calls.append(f"wake {' '.join(tags)}")
        self.asleep.difference_update(tags)

    @takes_what_vllm_takes
    def generate(self, prompts: Any, sampling_params: Any, *, use_tqdm: bool) -> list[Any]:
        assert not self.asleep and not torch.is_autocast_enabled("cuda")
        self.calls.append("generate")
        return [self._respond(prompt, sampling_params) for prompt in prompts]

    def _respond(self, request: dict[str, list[int]], sampling: SimpleNamespace) -> Any:
        assert sampling.ignore_eos and sampling.logprobs == 0 and not sampling.detokenize
        samples = generate(
            self.model,
            [request["prompt_token_ids"]],
            GenerationSettings(),
            Decoding(
                end_id=sampling.stop_token_ids[0],
                other_ends=tuple(sampling.stop_token_ids[1:]),
                max_new_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
            ),
        )
        [response], [logprobs] = samples
        pairs = zip(response, logprobs, strict=True)
        steps = [{token: of_class("Logprob", logprob=nats)} for token, nats in pairs]
        output = of_class("CompletionOutput", token_ids=tuple(response), logprobs=steps)
        return of_class("RequestOutput", outputs=[output])


@contextmanager
def vllm_installed() -> Iterator[None]:
    """Pretend that vLLM is installed and that there is a GPU. Its engine is made anew inside."""
    module = SimpleNamespace(LLM=FakeLLM, SamplingParams=partial(of_class, "SamplingParams"))
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" in INTERFACE.variables
    made = rlhf.generation.engines._vllm_of_process
    made.cache_clear()
    FakeLLM.started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "vllm", module)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        for name in SINGLE_PROCESS_VARIABLES:  # a variable that the engine sets does not stay
            patch.setenv(name, os.environ.get(name, "0"))
        yield
    made.cache_clear()


@contextmanager
def cuda_autocast(dtype: torch.dtype) -> Iterator[None]:
    """Make torch.autocast("cuda") work as with a GPU; without one torch refuses it."""
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        yield
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)
