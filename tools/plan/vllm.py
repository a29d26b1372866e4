"""Counts what vLLM takes of a GPU, as `rlhf.generation.vllm` starts it.

Awake, vLLM takes vllm_memory_share of the GPU's memory: its copy of the policy, the temporaries of
its passes, and all that is left for its cache. It starts inside the first rollout, when all of that
must be free. The first copy is made while the cache is there, later ones before the cache wakes.

vLLM sleeps from the end of sampling to the next time, and copy and cache leave the GPU.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from rlhf.generation.settings import GenerationSettings
from rlhf.generation.vllm import sources_of
from rlhf.measuring.allocations import DryRun
from tools.plan.launch import Launch


@dataclass(frozen=True)
class Vllm:
    """Bytes on the GPU of each process."""

    awake: int
    """All that vLLM takes."""
    copy: int
    """Its copy of the policy, which is part of it."""
    handed_over: int
    """The most that weights take on their way into the copy, besides."""

    @classmethod
    def of(
        cls,
        settings: GenerationSettings,
        launch: Launch,
        policy: PreTrainedModel,
        dtype: torch.dtype,
        dry: DryRun,
    ) -> "Vllm":
        """Count what the settings give to vLLM.

        Args:
            dtype: The type of the copy: that of autocast where vLLM starts, or the policy's.

        Raises:
            ValueError: vLLM would not start, or the GPU's memory is not known.
        """
        if launch.device == "cpu":
            raise ValueError(
                "generation.engine is vllm, and the launcher starts no process on a CUDA GPU; "
                "choose hf"
            )
        if launch.gpu_bytes is None:
            raise ValueError(
                "generation.engine is vllm, which takes a share of the GPU's memory, and there is "
                "no GPU here to ask for its size; give --gpu_gib 80, or what yours has"
            )
        sources = sources_of(policy)  # the copy has no adapters, but their sums with the weights
        numbers = sum(policy.get_parameter(own).numel() for own, *_ in sources.values())
        awake, copy = int(settings.vllm_memory_share * launch.gpu_bytes), numbers * dtype.itemsize
        if copy >= awake:
            raise ValueError(
                f"generation.vllm_memory_share is {settings.vllm_memory_share}, {awake / 1e9:.1f} "
                f"GB of the GPU, and vLLM's copy of the policy alone takes {copy / 1e9:.1f} GB; "
                f"give more than {copy / launch.gpu_bytes:.2f}"
            )
        gathered = launch.gathered_to_copy(policy, sources.values(), dtype)
        return cls(awake, copy, gathered + dry.handing_over(policy))

    @property
    def parts(self) -> dict[str, int]:
        """Its parts, by the names that the plan prints."""
        return {
            "vLLM's copy of the policy": self.copy,
            "vLLM's cache and passes": self.awake - self.copy,
            "weights on their way to vLLM": self.handed_over,
        }
