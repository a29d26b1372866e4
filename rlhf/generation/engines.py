"""The engine that the settings name, and sampling by one made for a single call."""

import functools
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from rlhf.generation.auto import FastestEngine
from rlhf.generation.continuous import ContinuousEngine
from rlhf.generation.hf import LoopEngine
from rlhf.generation.interface import Decoding, Engine, Samples
from rlhf.generation.settings import GenerationSettings


def make_engine(settings: GenerationSettings, tell: Callable[[str], object] = print) -> Engine:
    """The engine that the settings name; it has no weights before `refresh`.

    Args:
        tell: prints a line.

    Raises:
        ValueError: vLLM is asked for and not installed, or there is no GPU for it.
    """
    if settings.engine == "vllm":
        return _only_vllm(settings)
    engines: dict[str, Engine] = {
        "hf": LoopEngine(settings),
        "continuous": ContinuousEngine(settings),
    }
    if settings.engine == "auto":
        return FastestEngine(engines, settings.batch_size, tell)
    return engines[settings.engine]


def generate(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    decoding: Decoding,
    generator: torch.Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> Samples:
    """One response a prompt, by an engine made for this call; arguments as of `Engine.generate`."""
    engine = make_engine(settings)
    engine.refresh(policy)
    return engine.generate(prompts, decoding, generator, progress)


@functools.cache
def _only_vllm(settings: GenerationSettings) -> Engine:
    """vLLM does not give a GPU's memory back within a process, so there is one to a process."""
    from rlhf.generation.vllm import VllmEngine

    return VllmEngine(settings)
