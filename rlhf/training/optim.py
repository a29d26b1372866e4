"""Makes the optimizer, the learning rate schedule and the moving average of weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf.training.parameters import copy_into, trained_parameters
from rlhf.training.settings import OptimSettings
from rlhf.training.sharding import local_weights, set_local_weights


def make_optimizer(
    groups: Iterable[tuple[nn.Module, float]], settings: OptimSettings
) -> torch.optim.AdamW:
    """Make AdamW over several modules, each with its own peak learning rate.

    If settings.matrix_learning_rate is given, Muon trains the matrices between embedding and head.
    Weight decay applies to matrices only, not to biases and norm weights. Every parameter group
    has the number of its module under "module".
    """
    parameters = []
    for number, (module, learning_rate) in enumerate(groups):
        trained: list[nn.Parameter] = [*trained_parameters(module).values()]
        matrix_rate = settings.matrix_learning_rate
        inner = [] if matrix_rate is None else _inner_matrices(module)
        ids = {id(matrix) for matrix in inner}
        decay = settings.weight_decay
        outer = [p for p in trained if p.ndim >= 2 and id(p) not in ids]
        for chosen, rate, group_decay, is_muon in (
            (inner, matrix_rate, decay, True),
            (outer, learning_rate, decay, False),
            ([p for p in trained if p.ndim < 2], learning_rate, 0.0, False),
        ):
            if chosen:
                group = {"params": chosen, "lr": rate, "weight_decay": group_decay}
                parameters.append({**group, "module": number, "muon": is_muon})
    maker = torch.optim.AdamW if settings.matrix_learning_rate is None else MuonAndAdamW
    # A fused step passes over memory once. The default on a CPU does so once per operation.
    return maker(parameters, betas=settings.betas, eps=settings.eps, fused=True)


def _inner_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Return the weights of the linear layers between the embedding and the head.

    A head that is tied to the embedding is the same parameter."""
    outer = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    heads = {name for name, _ in module.named_modules() if name.split(".")[-1] in HEADS}
    inner = []
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear) and name not in heads and id(part.weight) not in outer:
            weight = part.weight
            assert isinstance(weight, nn.Parameter)
            if weight.requires_grad:
                inner.append(weight)
    return inner


HEADS = ("lm_head", "embed_out", "score", "head")
"""Names that the head of a policy or a scalar model can have."""


class MuonAndAdamW(torch.optim.AdamW):
    """Muon (Jordan et al. 2024) for the groups with "muon" set, AdamW for the others.

        m <- 0.95 m + 0.05 g;   w <- w - lr * (decay * w + s * orthogonal(0.05 g + 0.95 m))

    with s = sqrt(max(1, rows / columns)). A small model learns facts in about a third of AdamW's
    steps. torch.optim.Muon works in bfloat16, one matrix after another, which made a step on a CPU
    five times as long. Here it works in fp32, on all matrices of one shape at once.
    """

    MOMENTUM = 0.95

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["muon"]:
                self._step_matrices(group)
        adam = [group for group in self.param_groups if not group["muon"]]
        everything, self.param_groups = self.param_groups, adam
        try:
            super().step()
        finally:
            self.param_groups = everything

    def _step_matrices(self, group: dict[str, Any]) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in group["params"]:
            if matrix.ndim != 2 or isinstance(matrix, DTensor):
                raise ValueError(
                    "optim.matrix_learning_rate is given, but this launcher holds weights in "
                    "shards, which Muon cannot move; set it to null"
                )
            if matrix.grad is not None:
                by_shape.setdefault(matrix.shape, []).append(matrix)
        for (rows, columns), matrices in by_shape.items():
            directions = torch.stack([self._direction(matrix) for matrix in matrices])
            rate = -group["lr"] * max(1.0, rows / columns) ** 0.5
            for matrix, change in zip(matrices, orthogonalize(directions), strict=True):
                matrix.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=rate)

    def _direction(self, matrix: nn.Parameter) -> Tensor:
        """Return the Nesterov momentum of a matrix's gradient."""
        gradient = matrix.grad
        assert gradient is not None
        state = self.state[matrix]
        if not state:
            state["step"] = torch.zeros(())  # AdamW expects it in every state that it loads
            state["momentum"] = torch.zeros_like(matrix)
        state["step"] += 1
        momentum: Tensor = state["momentum"].lerp_(gradient, 1 - self.MOMENTUM)
        return gradient.lerp(momentum, self.MOMENTUM)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return matrices (batch, rows, columns) with the same singular vectors and values near 1.

    Take five Newton-Schulz steps with the coefficients of Jordan et al. 2024. They leave the
    singular values between about 0.7 and 1.2.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if is_tall else matrices
    # 1e-7 keeps a gradient of zeros from dividing by zero.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):  # x <- a x + (b s + c s s) x with s = x x^T, in place
        square = x @ x.mT
        fourth = square @ square
        change = square.mul_(b).add_(fourth.mul_(c)) @ x
        x.mul_(a).add_(change)
    return x.mT if is_tall else x


def make_schedule(
    optimizer: torch.optim.Optimizer,
    settings: OptimSettings,
    num_steps: int,
    first_steps: Mapping[int, int] | None = None,
) -> torch.optim.lr_scheduler.LambdaLR:
    """Make a scheduler that scales every group's learning rate by `schedule_factor`.

    Call its step() once per optimizer step.

    Args:
        first_steps: Maps the number of a module in `make_optimizer` to the step at which its
            schedule begins. Until then its gradients must be None.
    """
    waits = [(first_steps or {}).get(group["module"], 0) for group in optimizer.param_groups]
    factors = [schedule_factor(settings, num_steps, wait) for wait in waits]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factors)


def schedule_factor(
    settings: OptimSettings, num_steps: int, first_step: int = 0
) -> Callable[[int], float]:
    """Return the learning rate as a function of the step (from 0), as a share of the peak.

    The schedule begins at `first_step`. The rate rises linearly from min_lr_ratio (InstructGPT's
    PPO: a tenth of the peak). Then it is constant, or falls to min_lr_ratio on the last step along
    a line or half a cosine.
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

    InstructGPT evaluates the average with decay 0.992 (Ouyang et al. 2022, C.4). The paper does not
    say how often it is updated; here it is updated after every optimizer step.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Start at the weights. `module` is the one the optimizer holds; shards stay shards."""
        self.module = module
        self.decay = decay
        trained = trained_parameters(module)
        weights = local_weights(trained.values())
        self.average = {name: w.clone() for name, w in zip(trained, weights, strict=True)}

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the module's weights, after a step."""
        weights = local_weights(trained_parameters(self.module).values())
        for average, weight in zip(self.average.values(), weights, strict=True):
            average.lerp_(weight, 1 - self.decay)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        copy_into(self.average, state)

    def put_in_place(self) -> None:
        """Set the module's weights to the average, after the last step."""
        set_local_weights(trained_parameters(self.module).values(), self.average.values())

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Give the module the average as its weights inside the context."""
        trained = trained_parameters(self.module).values()
        own = [weight.clone() for weight in local_weights(trained)]
        self.put_in_place()
        try:
            yield
        finally:
            set_local_weights(trained, own)
