"""Tests one optimizer step by hand: the weight is 2, the rate 0.5, gradients are whole numbers."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from rlhf.inputs.packing import Packer, PromptTree, idle_row
from rlhf.maths.losses import policy_loss, ranking_loss, value_loss
from rlhf.models.heads import response_logprobs
from rlhf.training.nonfinite import NonFiniteError, with_remedy
from rlhf.training.optim import MovingAverage
from rlhf.training.settings import OptimSettings
from rlhf.training.step import Step, TrainState, equal_rows, make_train_state
from tests.rlhf.tiny_models import tiny_policy_of, tiny_scalar_of

ROWS = Packer(1).rows([PromptTree((5,), ((7, 8),)), PromptTree((6,), ((9,),))])


class Weights(nn.Module):
    """Holds two modules of one weight each, both 2."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        for parameter in self.parameters():
            nn.init.constant_(parameter, 2.0)

    @property
    def values(self) -> list[float]:
        return [parameter.item() for parameter in self.parameters()]

    @property
    def gradients(self) -> list[float | None]:
        return [None if p.grad is None else p.grad.item() for p in self.parameters()]


class TwoProcesses:
    """Looks like accelerate's object in the first of two processes; the second makes 3 passes."""

    num_processes = 2
    distributed_type = DistributedType.MULTI_CPU
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.is_synced = True
        self.backward_passes: list[bool] = []
        """Whether gradients were exchanged, for each backward pass."""

    @contextmanager
    def no_sync(self, model: nn.Module) -> Iterator[None]:
        self.is_synced = False
        yield
        self.is_synced = True

    def backward(self, loss: Tensor) -> None:
        self.backward_passes.append(self.is_synced)
        loss.backward()

    def gather(self, value: Tensor) -> Tensor:
        return torch.cat([value, torch.tensor([3])])


def make_state(
    model: Weights, max_grad_norm: float = math.inf, accelerator: Any = None, decay: float = 0.0
) -> TrainState[Weights]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    return TrainState(
        model=model,
        modules=[model.one, model.other],
        optimizer=optimizer,
        schedule=schedule,
        accelerator=accelerator or Accelerator(cpu=True),
        max_grad_norm=max_grad_norm,
    )


def add_three_and_four(step: Step, model: Weights) -> None:
    """Add gradients in two passes: 1 + 2 for `one`, and 0 + 4 for `other`."""
    for x in step.passes([torch.tensor([1.0, 0.0]), torch.tensor([2.0, 4.0])]):
        step.add(model.one.weight.sum() * x[0] + model.other.weight.sum() * x[1], {"x": x.sum()})


def test_passes_add_up_and_the_step_takes_their_sum() -> None:
    model = Weights()
    step = Step(make_state(model))
    add_three_and_four(step, model)
    assert step.sums == {"x": 7.0}
    assert step.take() == [3.0, 4.0]
    assert model.values == [2 - 0.5 * 3, 2 - 0.5 * 4]


def test_a_step_starts_without_gradients_and_keeps_its_own() -> None:
    model = Weights()
    state = make_state(model)
    step = Step(state)
    add_three_and_four(step, model)
    step.take()
    assert model.gradients == [3.0, 4.0]
    assert Step(state).sums == {} and model.gradients == [None, None]


def test_every_module_is_clipped_by_its_own_norm() -> None:
    """With a limit of 3.5, the gradient of 3 stays, and the one of 4 becomes 3.5."""
    model = Weights()
    step = Step(make_state(model, max_grad_norm=3.5))
    add_three_and_four(step, model)
    assert step.take() == [3.0, 4.0]
    assert model.values == pytest.approx([2 - 0.5 * 3, 2 - 0.5 * 3.5], abs=1e-6)


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_no_step_is_taken_with_a_gradient_that_is_not_finite(factor: float) -> None:
    model = Weights()
    state = make_state(model)
    step = Step(state)
    add_three_and_four(step, model)
    step.add(model.other.weight.sum() * factor)
    message = r"^gradient is not finite in .*; lower optim\.learning_rate \(0\.25\), or"
    remedy = with_remedy(OptimSettings(learning_rate=0.25))
    with pytest.raises(ValueError, match=message), remedy:
        step.take()
    with pytest.raises(NonFiniteError, match="gradient is not finite in phase train of step 0"):
        step.take()
    assert model.values == [2.0, 2.0] and state.learning_rate == 0.5


def test_the_schedule_and_the_average_follow_the_steps() -> None:
    """The weight is 2, 0.5, then 0.5 - 0.25 * 3 = -0.25; the average 2, 1.625, then 1.15625."""
    model = Weights()
    state = make_state(model)
    state.average = MovingAverage(model.one, decay=0.75)
    rates, averages = [], []
    for _ in range(2):
        step = Step(state)
        add_three_and_four(step, model)
        step.take()
        rates.append(step.learning_rate)
        averages.append(state.average.average["weight"].item())
    assert rates == [0.5, 0.25] and state.learning_rate == pytest.approx(0.5 / 3)
    assert averages == [0.75 * 2 + 0.25 * 0.5, 0.75 * 1.625 + 0.25 * -0.25]


def test_a_frozen_module_neither_moves_nor_counts() -> None:
    """Weight decay alone would move it; the other one moves by 0.5 * (3 + 0.1 * 2)."""
    model = Weights()
    step = Step(make_state(model, decay=0.1), frozen=[1])
    add_three_and_four(step, model)
    assert step.take() == [3.0, 0.0]
    assert model.values == pytest.approx([2 - 0.5 * 3.2, 2.0], abs=1e-6)


def test_one_process_goes_backward_from_each_loss_at_once() -> None:
    model = Weights()
    step = Step(make_state(model))
    seen = []
    for x in step.passes([torch.ones(1)]):
        step.add((model.one.weight * x).sum())
        seen.append(model.gradients)
        step.add((model.other.weight * x).sum())
        seen.append(model.gradients)
    assert seen == [[1.0, None], [1.0, 1.0]]


def test_a_loss_that_nothing_learns_from_is_only_counted() -> None:
    model = Weights()
    step = Step(make_state(model))
    step.add(torch.tensor(5.0), {"loss": 5.0})
    assert step.sums == {"loss": 5.0} and model.gradients == [None, None]


def test_several_processes_go_backward_once_a_pass_and_exchange_in_the_last() -> None:
    """Their launcher averages gradients, so `add` multiplies a loss by the number of processes."""
    model, processes = Weights(), TwoProcesses()
    step = Step(make_state(model, accelerator=processes))
    for x in step.passes([torch.ones(1), torch.full((1,), 2.0)]):
        step.add((model.one.weight * x).sum())
        step.add((model.other.weight * x).sum())
    assert processes.backward_passes == [False, True]
    assert model.gradients == [2 * 3.0, 2 * 3.0]


def test_passes_that_more_follow_exchange_nothing() -> None:
    model, processes = Weights(), TwoProcesses()
    step = Step(make_state(model, accelerator=processes))
    for _ in step.passes([torch.ones(1)], more_follow=True):
        step.add(model.one.weight.sum())
    for _ in step.passes([torch.ones(1)]):
        step.add(model.one.weight.sum())
    assert processes.backward_passes == [False, True]


def test_a_process_with_fewer_rows_makes_idle_passes() -> None:
    model, processes = Weights(), TwoProcesses()
    step = Step(make_state(model, accelerator=processes))
    lengths = []
    for row in step.rows(ROWS[:1]):
        step.add((model.one.weight * row.targets).sum(), {"tokens": row.targets.numel()})
        lengths.append(len(row.targets))
    assert lengths == [2, 0, 0]
    assert processes.backward_passes == [False, False, True]
    assert model.gradients[0] == 2 * (7 + 8) and step.sums == {"tokens": 2.0}
    assert len(equal_rows(processes, [])) == 3
    assert equal_rows(Accelerator(cpu=True), ROWS) == ROWS


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_an_idle_row_has_no_loss_and_a_gradient_of_zeros_for_every_weight(
    architecture: str,
) -> None:
    """Every weight needs one, because a launcher waits for each."""
    row = idle_row()
    policy, scalar = tiny_policy_of(architecture), tiny_scalar_of(architecture)
    nothing = torch.zeros(0, 0)
    logprobs = row.unpack(response_logprobs(policy, row))
    limits: dict[str, Any] = {"num_tokens": 9}
    of_policy, stats = policy_loss(
        logprobs, nothing, nothing, row.response_mask, clip_range=0.2, **limits
    )
    values = row.unpack(scalar(row.predictors, **row.model_inputs))
    of_values, _ = value_loss(
        values, nothing, nothing, row.response_mask, value_clip_range=0.2, **limits
    )
    scores = scalar(row.last_tokens, **row.model_inputs)
    of_scores, _ = ranking_loss(scores, nothing, row.tree_index, num_prompts=1)
    losses = [of_policy, of_values, of_scores]
    assert [loss.item() for loss in losses] == [0.0, 0.0, 0.0]
    assert {name: value.item() for name, value in stats.items()} == dict.fromkeys(stats, 0)
    torch.stack(losses).sum().backward()
    for model in (policy, scalar):
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_state_is_made_of_parts_with_rates_of_their_own() -> None:
    """Adam's first step is as long as its rate. The second part's schedule starts a step later."""
    model = Weights()
    settings = OptimSettings(learning_rate=9.0, schedule="linear", min_lr_ratio=0.0)
    groups = [(model.one, 0.5), (model.other, 0.25)]
    state = make_train_state(model, groups, settings, 3, Accelerator(cpu=True), {1: 1})
    assert state.module is model
    step = Step(state)
    add_three_and_four(step, model)
    step.take()
    assert model.values == pytest.approx([2 - 0.5, 2 - 0.25], abs=1e-5)
    rates = [group["lr"] for group in state.optimizer.param_groups]
    assert rates == pytest.approx([0.5 * 1 / 2, 0.25])
