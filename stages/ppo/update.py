"""Update both models on a rollout: clipped policy and value steps, plus the text's gradient."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.inputs.packing import PackedRow, PromptTree
from rlhf.maths.losses import policy_loss, value_loss
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.processes import sum_over_processes, sums_over_processes
from rlhf.training.step import Step
from stages.ppo.config import Config, PPOSettings
from stages.ppo.learner import POLICY, Learner, RowOutputs
from stages.ppo.metrics import Sums, describe_differences, update_metrics
from stages.ppo.monitor import Monitor
from stages.ppo.nonfinite import find_nonfinite
from stages.ppo.ptx import PretrainingMix, Teacher, no_teacher
from stages.ppo.rollout import Rollout


def update(
    learner: Learner,
    rollout: Rollout,
    texts: Iterator[list[PromptTree]],
    config: Config,
    generator: torch.Generator,
    monitor: Monitor | None = None,
    *,
    only_value: bool = False,
    teacher: Teacher = no_teacher,
) -> dict[str, float]:
    """Take all optimizer steps on one rollout; return metrics over its tokens and steps.

        loss = policy_loss + value_loss + ptx.coef * (mean nats a text token)

    The first two are means over the response tokens of a mini-batch on all processes. Policy and
    value model share no weight, so the value loss needs no coefficient.

    Args:
        texts: gives the text blocks of one step at a time; empty lists without ptx.
        generator: draws the order of episodes.
        monitor: checks the first ratio before the first step is taken.
        only_value: keep the policy as it is (ppo.value_warmup_updates).
        teacher: gives the model that the policy stays near on text (ptx.targets).

    Raises:
        NonFiniteError: the next step would make the weights NaN; it is not taken.
    """
    state, phase = learner.state, learner.stopwatch.phase
    ppo, temperature = config.ppo, config.rollout.temperature
    state.model.train()  # dropout is off; only this mode checkpoints activations
    total: Sums = {}
    first_ratio: dict[str, float] = {}
    for batch in mini_batches(rollout, config, generator, state.accelerator):
        with phase("ptx"):  # the first call of `next` reads and tokenises the file
            text = [] if only_value else next(texts)
            step = Step(state, frozen=[POLICY] if only_value else [])
            mix = PretrainingMix(step, learner, text, config.ptx, teacher)
            mix.add_text()
        with phase("train"):
            num_tokens = int(sum_over_processes(state.accelerator, batch.response_mask.sum()))
            log_ratios = []
            old_outputs = OldOutputs.of(batch, state.accelerator.device)
            for row in step.rows(learner.packer.rows(batch.trees)):
                new, old = (
                    RowOutputs(learner, row, temperature, only_value),
                    old_outputs.select(row),
                )
                log_ratios.append(add_policy_loss(step, row, new, old, num_tokens, ppo))
                add_value_loss(step, row, new, old, num_tokens, ppo)
        if not total:  # no step was taken yet
            nats = torch.cat(log_ratios)
            first_ratio = describe_differences("ppo/first_log_ratio", nats, state.accelerator)
            if monitor is not None:
                monitor.inspect(first_ratio)
        with phase("step"):
            balance = mix.balance()
            try:
                policy_norm, value_norm = step.take()
            except NonFiniteError:
                raise find_nonfinite(learner, batch.trees, text) from None
        norms = {"policy_grad_norm": policy_norm, "value_grad_norm": value_norm}
        sums = {"steps": 1.0, **step.sums, **balance, **norms}
        for name, value in sums.items():
            total[name] = total.get(name, 0.0) + value
        if moved_too_far(sums, ppo.max_step_kl, state.accelerator):
            break
    state.model.eval()
    state.optimizer.zero_grad()  # the next rollout needs the memory
    metrics = update_metrics(sums_over_processes(state.accelerator, total))
    return metrics | first_ratio | {"ppo/steps": total["steps"]}


def add_policy_loss(
    step: Step,
    row: PackedRow,
    new: RowOutputs,
    old: "OldOutputs",
    num_tokens: int,
    ppo: PPOSettings,
) -> Tensor:
    """Add the gradient of a row's clipped policy loss; return log(new / old) of its tokens,
    (tokens,)."""
    logprobs = new.logprobs
    loss, stats = policy_loss(
        logprobs,
        old.logprobs,
        old.advantages,
        row.response_mask,
        clip_range=ppo.clip_range,
        num_tokens=num_tokens,
    )
    counts = {"policy_loss": loss.detach() * num_tokens, "tokens": row.response_mask.sum()}
    step.add(loss, stats | counts)
    return row.pack((logprobs - old.logprobs).detach())


def add_value_loss(
    step: Step,
    row: PackedRow,
    new: RowOutputs,
    old: "OldOutputs",
    num_tokens: int,
    ppo: PPOSettings,
) -> None:
    """Add the gradient of a row's value loss."""
    loss, stats = value_loss(
        new.values,
        old.values,
        old.returns,
        row.response_mask,
        value_clip_range=ppo.value_clip_range,
        num_tokens=num_tokens,
    )
    step.add(loss, stats | {"value_loss": loss.detach() * num_tokens})


def mini_batches(
    rollout: Rollout, config: Config, generator: torch.Generator, accelerator: Accelerator
) -> Iterator[Rollout]:
    """Yield this process's share of each mini-batch; every epoch has all episodes in a new
    order."""
    for _ in range(config.ppo.num_epochs):
        order = torch.randperm(len(rollout.trees), generator=generator)
        for episodes in order.split(config.ppo.mini_batch_size // accelerator.num_processes):
            yield rollout.select(episodes)


def moved_too_far(sums: Sums, max_step_kl: float | None, accelerator: Accelerator) -> bool:
    """Return whether this step's policy was further than max_step_kl from the one that sampled."""
    if max_step_kl is None:
        return False
    nats, tokens = (sum_over_processes(accelerator, sums[k]) for k in ("approx_kl", "tokens"))
    return float(nats) > max_step_kl * float(tokens)


@dataclass(frozen=True)
class OldOutputs:
    """Holds what the losses take from the rollout, for a mini-batch or a row, (responses, time)."""

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(cls, batch: Rollout, device: torch.device) -> "OldOutputs":
        """Copy a mini-batch's tensors to the device, once for all its rows and without waiting."""
        names = cls.__dataclass_fields__
        return cls(**{name: getattr(batch, name).to(device, non_blocking=True) for name in names})

    def select(self, row: PackedRow) -> "OldOutputs":
        """Return the tensors of a packed row's responses."""
        return replace(self, **{name: row.select(value) for name, value in vars(self).items()})
