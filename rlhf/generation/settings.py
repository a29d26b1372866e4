"""Settings of sampling, shared by every stage that samples."""

from dataclasses import dataclass
from typing import Literal

from rlhf.inputs.ranges import require


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How responses are sampled. The choice changes only speed, rounding and the order of draws."""

    engine: Literal["hf", "vllm"] = "hf"
    """hf: our own loop over the model's cache. vllm: vLLM on the GPU that trains, which gets the
    weights before every rollout; not yet tested."""
    batch_size: int = 64
    """Responses sampled at once in each process. It bounds the memory of the KV cache."""
    vllm_memory_share: float = 0.3
    """Share of the GPU's memory that vllm takes for its copy of the weights and its cache."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "batch_size", self.batch_size, "give 1 or more")
        share = self.vllm_memory_share
        require(0 < share < 1, "vllm_memory_share", share, "give a number in (0, 1), such as 0.3")
