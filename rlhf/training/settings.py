"""Defines settings of the optimizer, shared by every stage that trains."""

from dataclasses import dataclass
from typing import Annotated, Literal

from rlhf.inputs.ranges import NotNegative, NotNegativeInt, Positive, Range, Ranged, Share


@dataclass(frozen=True, kw_only=True)
class OptimSettings(Ranged):
    """AdamW, its learning rate schedule and the gradient clip."""

    learning_rate: Positive = 1e-5
    """Peak learning rate, reached after the warm-up."""
    matrix_learning_rate: Positive | None = None
    """Peak learning rate of Muon, such as 0.02 for a model from scratch. Muon then trains the
    matrices between embedding and head. None trains all weights with AdamW. Muon cannot train
    weights that are split between processes."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up. Cosine and linear end at min_lr_ratio on the
    last step."""
    warmup_steps: NotNegativeInt = 0
    """Optimizer steps in which the learning rate rises linearly from min_lr_ratio times its peak to
    its peak."""
    min_lr_ratio: Share = 0.1
    """Learning rate on the first step of a warm-up, as a share of the peak. Unless the schedule is
    constant, the last step has it too."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moments."""
    eps: Positive = 1e-8
    """Number added to the root of Adam's second moment."""
    weight_decay: NotNegative = 0.0
    """Decoupled weight decay on matrices. Biases and norm weights have none."""
    max_grad_norm: Annotated[float, Range(above=0, may_be_infinite=True)] = 1.0
    """Gradients with a larger global norm are scaled down to it. .inf means no clip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"betas is {list(self.betas)}; give two numbers from 0 to below 1, such as [0.9, "
                "0.95]"
            )
