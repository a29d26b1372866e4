"""Takes one optimizer step, whatever is split between the processes.

    step = Step(state)
    for row in step.rows(packer.rows(trees)):
        loss, stats = policy_loss(...)
        step.add(loss, stats)
    (norm,) = step.take()

The loop reads the same in one process, and under DDP, ZeRO and FSDP2. A step owns what they need:

- Every process runs the same number of passes, because all wait for each other in each pass. A
  process that has fewer rows gets idle ones.
- Whole gradients are exchanged in the last pass only.
- Launchers average gradients over processes, but a step needs their sum: each loss is divided by a
  count over the batch of all processes. So losses are multiplied by the number of processes.
- Every module is clipped by a norm of its own. No step is taken with a gradient that is not finite.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.inputs.packing import PackedRow, idle_row
from rlhf.training import sharding
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.numbers import to_floats
from rlhf.training.optim import MovingAverage, make_optimizer, make_schedule
from rlhf.training.parameters import trained_parameters
from rlhf.training.processes import max_over_processes
from rlhf.training.settings import OptimSettings

Model = TypeVar("Model", bound=nn.Module)
Inputs = TypeVar("Inputs", PackedRow, Tensor)


@dataclass
class TrainState(Generic[Model]):
    """Holds what a step changes: the weights, the optimizer, the learning rates, the average."""

    model: nn.Module
    """the trained model in the launcher's wrapper; passes with a gradient must call this one"""
    modules: Sequence[nn.Module]
    """the parts of the model, each clipped by its own norm, in the order of `make_optimizer`"""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    accelerator: Accelerator
    max_grad_norm: float
    average: MovingAverage | None = None

    @cached_property
    def module(self) -> Model:
        """The model without the launcher's wrapper. Every pass reads it, and to find it takes a
        millisecond."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def learning_rate(self) -> float:
        """Learning rate of the first module at the next step."""
        return float(self.schedule.get_last_lr()[0])

    @property
    def is_exchanged(self) -> bool:
        """Whether processes exchange gradients, which allows only one backward pass per row."""
        return self.accelerator.num_processes > 1 or sharding.shards_gradients(self.accelerator)


def make_train_state(
    model: Model,
    groups: Sequence[tuple[nn.Module, float]],
    settings: OptimSettings,
    num_steps: int,
    accelerator: Accelerator,
    first_steps: Mapping[int, int] | None = None,
) -> TrainState[Model]:
    """Make the optimizer and its schedule, and wrap the model for the launcher.

    Args:
        groups: Parts of the model, each with its peak learning rate (see make_optimizer).
        num_steps: Number of steps in the whole run, over which the learning rate falls.
        first_steps: Maps the number of a part to the step at which its schedule begins.
    """
    optimizer = make_optimizer(groups, settings)
    schedule = make_schedule(optimizer, settings, num_steps, first_steps)
    wrapped, prepared = sharding.prepare(accelerator, model, optimizer)
    modules = [module for module, _ in groups]
    return TrainState(wrapped, modules, prepared, schedule, accelerator, settings.max_grad_norm)


class Step:
    """One optimizer step, which starts without gradients and ends with `take`.

    Args:
        frozen: Indices in `state.modules` of those that this step must not change.
    """

    def __init__(self, state: TrainState, *, frozen: Collection[int] = ()) -> None:
        self.state = state
        self.learning_rate = state.learning_rate
        """The learning rate of this step."""
        self._frozen = frozen
        self._kept_losses: list[Tensor] = []
        self._sums: dict[str, Tensor | float] = {}
        state.optimizer.zero_grad()

    @property
    def sums(self) -> dict[str, float]:
        """The sums of all `stats` so far, on this process."""
        return dict(zip(self._sums, to_floats(list(self._sums.values())), strict=True))

    def rows(self, rows: Sequence[PackedRow], *, more_follow: bool = False) -> Iterator[PackedRow]:
        """Yield this process's rows on the device, each in a pass of its own, then idle rows.

        Args:
            more_follow: Whether this step makes more passes after these.
        """
        return self.passes(equal_rows(self.state.accelerator, rows), more_follow=more_follow)

    def passes(self, inputs: Sequence[Inputs], *, more_follow: bool = False) -> Iterator[Inputs]:
        """Yield inputs on the device, each in a pass of its own: run the model and call `add`.

        All processes must give the same number of inputs; `rows` makes them equal.
        """
        state = self.state
        # Shards are exchanged at the end of each loop, so that they can be read between loops.
        is_synced = not more_follow or sharding.shards_gradients(state.accelerator)
        for number, one in enumerate(inputs, start=1):
            is_last = is_synced and number == len(inputs)
            with sharding.one_pass(state.accelerator, state.model, is_last=is_last):
                # The copy does not wait, because the device may be busy with the pass before.
                yield one.to(state.accelerator.device, non_blocking=True)
                self._backward()

    def add(self, loss: Tensor, stats: Mapping[str, Tensor | float] | None = None) -> None:
        """Add the gradient of a loss, and values to the sums for the metrics.

        A single process runs the backward pass at once, so a pass with two models holds the
        activations of one at a time. Processes that exchange gradients do so once a pass, so its
        losses are summed and their backward pass runs at its end.

        Args:
            loss: This pass's part of the loss over the batch of all processes. It is ignored if it
                requires no gradient.
            stats: Values to sum over the passes. They stay on their device, so that the next pass
                need not wait for a GPU.
        """
        if loss.requires_grad:
            self._kept_losses.append(loss)
        if not self.state.is_exchanged:
            self._backward()
        self.add_stats(stats or {})

    def add_stats(self, stats: Mapping[str, Tensor | float]) -> None:
        """Add values to the sums for the metrics, without a loss."""
        for name, value in stats.items():
            value = value.detach() if isinstance(value, Tensor) else value
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self) -> list[float]:
        """Clip the gradients, take the step, and advance the schedule and the average.

        The gradients remain until the next step, except under DeepSpeed.

        Returns:
            The norm of each module's gradient over all processes, before the clip.

        Raises:
            NonFiniteError: A norm is NaN or infinite. The step is not taken.
        """
        state = self.state
        for number in self._frozen:
            sharding.drop_gradients(state.accelerator, state.modules[number].parameters())
        norms = to_floats(
            [
                sharding.clip_gradients(
                    state.accelerator, trained_parameters(module).values(), state.max_grad_norm
                )
                for module in state.modules
            ]
        )
        if not math.isfinite(sum(norms)):
            raise NonFiniteError("gradient", "train", step=state.schedule.last_epoch)
        sharding.take_step(state.accelerator, state.model, state.optimizer, self._frozen)
        state.schedule.step()
        if state.average is not None:
            state.average.update()
        return norms

    def _backward(self) -> None:
        """Run the backward pass of the losses that `add` has kept."""
        if self._kept_losses:
            loss = (
                sum(self._kept_losses[1:], start=self._kept_losses[0])
                * self.state.accelerator.num_processes
            )
            sharding.backward(self.state.accelerator, self.state.model, loss)
            self._kept_losses.clear()


def equal_rows(accelerator: Accelerator, rows: Sequence[PackedRow]) -> list[PackedRow]:
    """Return this process's rows, and idle ones up to the largest number of any process."""
    num_passes = max_over_processes(accelerator, len(rows))
    return [*rows, *[idle_row()] * (num_passes - len(rows))]
