"""Defines settings of sampling, shared by every stage that samples."""

from dataclasses import dataclass
from typing import Literal

from rlhf.inputs.ranges import PositiveInt, Ranged, ShareBetween


@dataclass(frozen=True, kw_only=True)
class GenerationSettings(Ranged):
    """Settings of sampling. They change only speed, rounding and the order of draws."""

    engine: Literal["hf", "vllm"] = "hf"
    """hf: our own loop over the model's cache. vllm: vLLM on the GPU that trains, which gets the
    weights before every rollout; not yet tested."""
    batch_size: PositiveInt = 64
    """Responses sampled at once in each process. It bounds the memory of the KV cache."""
    vllm_memory_share: ShareBetween = 0.3
    """Share of the GPU's memory that vllm takes for its copy of the weights and its cache."""
