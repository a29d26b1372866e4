"""Makes the engine that the settings name, to keep or for a single call."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from rlhf.generation.hf import LoopEngine
from rlhf.generation.interface import Decoding, Engine, Samples
from rlhf.generation.settings import GenerationSettings


def make_engine(settings: GenerationSettings) -> Engine:
    """Make the engine that the settings name. It has no weights before `refresh`.

    Raises:
        ValueError: The settings name vLLM, but it is not installed or there is no GPU for it.
    """
    if settings.engine == "vllm":
        return _vllm_of_process(settings)
    return LoopEngine(settings)


def check_can_sample_alone(settings: GenerationSettings, num_processes: int) -> None:
    """Refuse vLLM in a stage in which only the first of several processes samples.

    vLLM joins all processes when it starts, so the first one would wait for ever.

    Raises:
        ValueError: The engine is vLLM, and there are several processes.
    """
    if settings.engine == "vllm" and num_processes > 1:
        raise ValueError(
            f"generation.engine is vllm, which all {num_processes} processes must start together, "
            "and only the first one samples in this stage; start it in one process, or choose hf"
        )


@contextmanager
def engine_of(policy: PreTrainedModel, settings: GenerationSettings) -> Iterator[Engine]:
    """Make the engine that the settings name, ready to sample from these weights, and release it
    at the end: what comes next needs the memory of vLLM's copy."""
    engine = make_engine(settings)
    engine.refresh(policy)
    try:
        yield engine
    finally:
        engine.release()


def generate(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    decoding: Decoding,
    generator: torch.Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> Samples:
    """Sample one response per prompt with a new engine. `Engine.generate` has the arguments."""
    with engine_of(policy, settings) as engine:
        return engine.generate(prompts, decoding, generator, progress)


@functools.cache
def _vllm_of_process(settings: GenerationSettings) -> Engine:
    """Make vLLM's engine once per process, since its GPU memory is freed only at the end."""
    from rlhf.generation.vllm import VllmEngine

    return VllmEngine(settings)
