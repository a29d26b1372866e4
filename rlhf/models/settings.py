"""Defines settings of a model: which one, the type of its weights, and its adapter."""

from dataclasses import dataclass
from typing import Literal

from rlhf.inputs.ranges import NotNegativeInt, Positive, Ranged

Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """A model to load, and the type of its weights."""

    path: str
    """Model: a local folder or a hub id."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Keep float32 for a model that is trained: at the learning rates of RLHF,
    bfloat16 weights hardly move."""
    attention: Attention = "sdpa"
    """Attention implementation. With sdpa the responses to a prompt share one pass over it. With
    flash_attention_2 each has a copy of it, and no mask is needed. With flex_attention they share
    it, and a GPU compiles kernels that leave out what the mask forbids."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Set it only for sources that you trust."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("path is empty; give a model folder or a hub id")


@dataclass(frozen=True, kw_only=True)
class LoraSettings(Ranged):
    """Settings of a low-rank adapter, trained over frozen weights (Hu et al. 2021).

    There is no dropout, because with it the first ratio of PPO would not be 1.
    """

    rank: NotNegativeInt = 0
    """Rank of the adapter; 0 trains all weights. An adapter in the model folder is trained further,
    if this is its own rank; 0 merges it into its base."""
    alpha: Positive = 16.0
    """The adapter's output is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear layers that get an adapter, such as [q_proj, v_proj]. all-linear means
    every one except the output layer, or those of the adapter that is trained further."""
    quantize: Literal["none", "4bit"] = "none"
    """Type of the frozen weights: none means model.dtype; 4bit is QLoRA's (Dettmers et al. 2023)
    and needs the package bitsandbytes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.target_modules:
            raise ValueError("target_modules is empty; name linear layers, or give all-linear")
        if self.quantize != "none" and self.rank == 0:
            raise ValueError(
                f"quantize is {self.quantize} and rank is 0; quantised weights cannot be trained, "
                "only an adapter over them; give a rank, such as 16"
            )


NO_LORA = LoraSettings()
"""No adapter: all weights are trained. An adapter in the folder is merged into its base."""
