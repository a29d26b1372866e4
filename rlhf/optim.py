"""Optimizer, learning rate schedule and moving average of weights."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from rlhf.config import OptimSettings
from rlhf.sharding import local_weights, set_local_weights
from rlhf.state import copy_into, trained_parameters


def make_optimizer(
    groups: Iterable[tuple[nn.Module, float]], settings: OptimSettings
) -> torch.optim.AdamW:
    """AdamW over several modules, each with its own peak learning rate.

    Weight decay is for matrices only; biases and norm weights have none. Every parameter group has
    the number of its module under "module".
    """
    parameters = []
    for number, (module, learning_rate) in enumerate(groups):
        trained = trained_parameters(module).values()
        for chosen, decay in (
            ([p for p in trained if p.ndim >= 2], settings.weight_decay),
            ([p for p in trained if p.ndim < 2], 0.0),
        ):
            if chosen:
                group = {"params": chosen, "lr": learning_rate, "weight_decay": decay}
                parameters.append({**group, "module": number})
    # One pass over memory; the default on a CPU, an operation after another, takes several.
    return torch.optim.AdamW(parameters, betas=settings.betas, eps=settings.eps, fused=True)


def make_schedule(
    optimizer: torch.optim.Optimizer,
    settings: OptimSettings,
    num_steps: int,
    first_steps: Mapping[int, int] | None = None,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Scales every group's learning rate by `schedule_factor`, one call of step() a step.

    Args:
        first_steps: number of a module of `make_optimizer` -> step at which its schedule begins;
            until then its gradients must be None.
    """
    waits = [(first_steps or {}).get(group["module"], 0) for group in optimizer.param_groups]
    factors = [schedule_factor(settings, num_steps, wait) for wait in waits]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def schedule_factor(
    settings: OptimSettings, num_steps: int, first_step: int = 0
) -> Callable[[int], float]:
    """Learning rate of a step (0 first) as a share of the peak, on a schedule from `first_step` on.

    Linear warm-up from min_lr_ratio (InstructGPT's PPO: a tenth of the peak), then constant, or
    falling to min_lr_ratio on the last step along a line or half a cosine.
    """
    low = settings.min_lr_ratio

    def factor(step: int) -> float:
        step = max(step - first_step, 0)
        if step < settings.warmup_steps:
            return low + (1 - low) * step / settings.warmup_steps
        if settings.schedule == "constant":
            return 1.0
        falling = max(num_steps - first_step - 1 - settings.warmup_steps, 1)
        progress = min((step - settings.warmup_steps) / falling, 1.0)
        if settings.schedule == "cosine":
            progress = 0.5 * (1 - math.cos(math.pi * progress))
        return 1 - (1 - low) * progress

    return factor


class MovingAverage:
    """Exponential moving average of the trained weights, in fp32: avg <- d avg + (1 - d) weight.

    InstructGPT evaluates the average with decay 0.992 (Ouyang et al. 2022, C.4); the paper does not
    say how often it is updated, here it is once an optimizer step.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """The module as the optimizer knows it: where its weights are in shards, so is this."""
        self.decay = decay
        trained = trained_parameters(module)
        weights = local_weights(trained.values())
        self.average = {name: w.clone() for name, w in zip(trained, weights, strict=True)}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        weights = local_weights(trained_parameters(module).values())
        for average, weight in zip(self.average.values(), weights, strict=True):
            average.lerp_(weight, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        copy_into(self.average, state)

    def copy_to(self, module: nn.Module) -> None:
        set_local_weights(trained_parameters(module).values(), self.average.values())
