"""Settings of the optimizer, shared by every stage that trains."""

import math
from dataclasses import dataclass
from typing import Literal

from rlhf.inputs.ranges import require


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """AdamW, its learning rate schedule and the gradient clip."""

    learning_rate: float = 1e-5
    """Peak learning rate, reached after the warm-up."""
    matrix_learning_rate: float | None = None
    """Peak learning rate of Muon, such as 0.02 for a model from scratch. Muon then trains the
    matrices between embedding and head. None trains all weights with AdamW. Muon cannot train
    weights that are split between processes."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up. Cosine and linear end at min_lr_ratio on the
    last step."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises linearly from min_lr_ratio times its peak to
    its peak."""
    min_lr_ratio: float = 0.1
    """Learning rate on the first step of a warm-up, as a share of the peak. Unless the schedule is
    constant, the last step has it too."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moments."""
    eps: float = 1e-8
    """Number added to the root of Adam's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices. Biases and norm weights have none."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it. .inf means no clip."""

    def __post_init__(self) -> None:
        require(
            0 < self.learning_rate < math.inf,
            "learning_rate",
            self.learning_rate,
            "give a positive number, such as 1e-5",
        )
        require(
            self.matrix_learning_rate is None or 0 < self.matrix_learning_rate < math.inf,
            "matrix_learning_rate",
            self.matrix_learning_rate,
            "give a positive number, such as 0.02, or null for AdamW alone",
        )
        require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "give 0 or more steps")
        require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "give 0 to 1")
        require(
            all(0 <= beta < 1 for beta in self.betas),
            "betas",
            list(self.betas),
            "give two numbers from 0 to below 1, such as [0.9, 0.95]",
        )
        require(self.eps > 0, "eps", self.eps, "give a positive number, such as 1e-8")
        require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "give 0 or more")
        require(
            self.max_grad_norm > 0,
            "max_grad_norm",
            self.max_grad_norm,
            "give a positive number, such as 1.0, or .inf for no clip",
        )
