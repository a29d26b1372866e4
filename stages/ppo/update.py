"""Update both models on a rollout: clipped policy and value steps, plus the text's gradient."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.inputs.packing import PackedRow, Packer, PromptTree
from rlhf.maths.losses import Stats, policy_loss, value_loss
from rlhf.models.heads import response_logprobs
from rlhf.models.scalar import ScalarModel
from rlhf.runs.stateful import OptimizerState, Stateful, Weights
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training import sharding
from rlhf.training.nonfinite import NonFiniteError, first_nonfinite, found_by_any
from rlhf.training.optim import MovingAverage
from rlhf.training.parameters import trained_parameters
from rlhf.training.processes import max_over_processes, sum_over_processes
from stages.ppo.config import Config
from stages.ppo.metrics import Sums, update_metrics
from stages.ppo.rollout import Rollout

POLICY = 0
"""Index of the policy among the modules of the optimizer (see make_optimizer)."""


class PolicyAndValue(nn.Module):
    """Joins both trained models, since DeepSpeed and FSDP wrap only one module per Accelerator."""

    def __init__(self, policy: PreTrainedModel, value_model: ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model

    def forward(
        self,
        row: PackedRow,
        temperature: float = 1.0,
        *,
        with_logprobs: bool = True,
        with_values: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return log-probabilities and values of each response token of a packed row, both
        (tokens,)."""
        logprobs = response_logprobs(self.policy, row, temperature) if with_logprobs else None
        values = self.value_model(row.predictors, **row.model_inputs) if with_values else None
        return logprobs, values


@dataclass
class Learner:
    """Holds what an update changes: the models, their optimizer, schedule and moving average."""

    model: nn.Module
    """PolicyAndValue, as the accelerator wrapped it"""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: MovingAverage | None
    packer: Packer
    accelerator: Accelerator
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def models(self) -> PolicyAndValue:
        return self.accelerator.unwrap_model(self.model)

    def parts(self) -> dict[str, Stateful]:
        """Return what a checkpoint must hold of the learner, by name."""
        parts: dict[str, Stateful] = {
            "models": Weights(self.models),
            "optimizer": OptimizerState(self.optimizer, self.models),
            "schedule": self.schedule,
        }
        return parts if self.average is None else {**parts, "average": self.average}


def update(
    learner: Learner,
    rollout: Rollout,
    texts: Iterator[list[PromptTree]],
    config: Config,
    generator: torch.Generator,
    *,
    only_value: bool = False,
    look_at_ratio: Callable[[float], object] = lambda _: None,
) -> dict[str, float]:
    """Take all optimizer steps on one rollout; return metrics over its tokens and steps.

    Args:
        texts: gives the text blocks of one step at a time; empty lists without ptx.
        generator: draws the order of episodes.
        only_value: the policy stays as it is (ppo.value_warmup_updates).
        look_at_ratio: called before the first step, with the largest absolute log-ratio of a token.

    Raises:
        NonFiniteError: the next step would make the weights NaN; it is not taken.
    """
    total: Sums = {}
    first_log_ratio = 0.0

    def look(max_log_ratio: float) -> None:
        nonlocal first_log_ratio
        if not total:
            first_log_ratio = max_over_processes(learner.accelerator, max_log_ratio)
            look_at_ratio(first_log_ratio)

    learner.model.train()  # dropout is off; only this mode checkpoints activations
    for batch in _mini_batches(learner, rollout, config, generator):
        with learner.watch.phase("ptx"):  # the first call reads and tokenises the file
            text_batch = [] if only_value else next(texts)
        step = optimizer_step(
            learner, batch, text_batch, config, only_value=only_value, look_at_ratio=look
        )
        for name, value in step.items():
            total[name] = total.get(name, 0.0) + value
        if _moved_too_far(learner, step, config.ppo.max_step_kl):
            break
    learner.model.eval()
    learner.optimizer.zero_grad()  # the next rollout needs the memory
    sums = {k: float(sum_over_processes(learner.accelerator, v)) for k, v in total.items()}
    return update_metrics(sums) | {
        "ppo/first_log_ratio": first_log_ratio,
        "ppo/steps": total["steps"],
    }


def _mini_batches(
    learner: Learner, rollout: Rollout, config: Config, generator: torch.Generator
) -> Iterator[Rollout]:
    """Yield this process's share of each mini-batch; every epoch has all episodes in a new
    order."""
    for _ in range(config.ppo.num_epochs):
        order = torch.randperm(len(rollout.trees), generator=generator)
        for episodes in order.split(
            config.ppo.mini_batch_size // learner.accelerator.num_processes
        ):
            yield rollout.select(episodes)


def _moved_too_far(learner: Learner, step: Sums, max_step_kl: float | None) -> bool:
    """Tell whether the policy was further from the rollout's at this step than an update may go."""
    if max_step_kl is None:
        return False
    nats, tokens = (
        sum_over_processes(learner.accelerator, step[k]) for k in ("approx_kl", "tokens")
    )
    return float(nats) > max_step_kl * float(tokens)


def optimizer_step(
    learner: Learner,
    batch: Rollout,
    texts: Sequence[PromptTree],
    config: Config,
    *,
    only_value: bool = False,
    look_at_ratio: Callable[[float], object] = lambda _: None,
) -> Sums:
    """Sum the gradients of a mini-batch and its text, then take one step.

        loss = policy_loss + value_loss + ptx.coef * (mean nats a text token)

    The first two are means over the response tokens of the mini-batch on all processes. Policy and
    value model share no weight, so the value loss needs no coefficient.

    Args:
        look_at_ratio: called before the step, with the largest absolute log-ratio of a token on
            this process.
    """
    accelerator = learner.accelerator
    with learner.watch.phase("step"):  # unwrapping takes milliseconds too
        policy, value_model = learner.models.policy, learner.models.value_model
        learner.optimizer.zero_grad()
    ratio = config.ptx.grad_norm_ratio
    sums: Sums = {"steps": 1.0}
    is_watched = bool(texts) and (
        config.ptx.gradient_norms or ratio is not None or sharding.shards_gradients(accelerator)
    )
    watched = list(trained_parameters(policy).values()) if is_watched else []
    with learner.watch.phase("ptx"):
        sums |= _text_pass(learner, texts, config.ptx.coef if ratio is None else 1.0)
        text_gradients = _set_aside(learner, watched)
    with learner.watch.phase("train"):
        sums |= _episode_pass(learner, batch, config, only_value=only_value)
        look_at_ratio(sums.pop("max_log_ratio"))
    with learner.watch.phase("step"):
        sums |= _balance(learner, watched, text_gradients, config)
        for name, module in (("policy_grad_norm", policy), ("value_grad_norm", value_model)):
            sums[name] = sharding.clip_gradients(
                accelerator, trained_parameters(module).values(), config.optim.max_grad_norm
            )
        if not math.isfinite(sums["policy_grad_norm"] + sums["value_grad_norm"]):
            raise find_nonfinite(learner, batch, texts)
        sharding.take_step(
            accelerator,
            learner.model,
            learner.optimizer,
            frozen={POLICY: policy} if only_value else {},
        )
        learner.schedule.step()
        if learner.average is not None:
            learner.average.update(policy)
    return sums


def _episode_pass(learner: Learner, batch: Rollout, config: Config, *, only_value: bool) -> Sums:
    """Add the gradients of policy and value loss; the last pass synchronises the processes."""
    accelerator = learner.accelerator
    num_tokens = int(sum_over_processes(accelerator, batch.response_mask.sum()))
    rows = learner.packer.rows(batch.trees)
    num_passes = max_over_processes(accelerator, len(rows))
    sums: dict[str, Tensor] = {"tokens": batch.response_mask.sum()}
    max_log_ratios = [torch.zeros((), device=accelerator.device)]
    for number in range(num_passes):
        row = rows[min(number, len(rows) - 1)].to(accelerator.device)
        weight = float(number < len(rows))  # a process with fewer rows repeats one at weight 0
        part = RowBatch.of(batch, row)
        for models in _models_at_a_time(accelerator):
            is_last = number == num_passes - 1
            learns = models.get("with_values", True) or not only_value
            with (
                sharding.one_pass(accelerator, learner.model, is_last=is_last),
                torch.set_grad_enabled(learns),
            ):
                logprobs, values = learner.model(row, config.rollout.temperature, **models)
                policy, value, stats = _losses(logprobs, values, row, part, config, num_tokens)
                loss = policy * float(not only_value) + value
                if learns:
                    loss = loss * weight * accelerator.num_processes
                    sharding.backward(accelerator, learner.model, loss)
            if weight:
                if logprobs is not None:
                    max_log_ratios.append(stats.pop("max_log_ratio"))
                _add(sums, {"policy_loss": policy, "value_loss": value}, scale=num_tokens)
                _add(sums, stats)
    return {
        **{name: float(value) for name, value in sums.items()},
        "max_log_ratio": float(torch.stack(max_log_ratios).max()),
    }


def _models_at_a_time(accelerator: Accelerator) -> list[dict[str, bool]]:
    """Return the passes over a row, each as arguments of PolicyAndValue.

    One pass for each model holds half the activations of a pass through both. Several processes
    need the joint pass, since they exchange the gradients of both models in one backward pass.
    """
    if accelerator.num_processes > 1 or sharding.shards_gradients(accelerator):
        return [{}]
    return [{"with_values": False}, {"with_logprobs": False}]


def _losses(
    logprobs: Tensor | None,
    values: Tensor | None,
    row: PackedRow,
    part: "RowBatch",
    config: Config,
    num_tokens: int,
) -> tuple[Tensor, Tensor, Stats]:
    """Return policy loss, value loss, and sums over tokens for the metrics.

    A model without outputs in this pass has a loss of 0 and no sums.
    """
    policy = value = torch.zeros((), device=row.device)
    stats: Stats = {}
    if logprobs is not None:
        policy, policy_stats = policy_loss(
            row.unpack(logprobs),
            part.logprobs,
            part.advantages,
            row.response_mask,
            clip_range=config.ppo.clip_range,
            num_tokens=num_tokens,
        )
        stats |= policy_stats
    if values is not None:
        value, value_stats = value_loss(
            row.unpack(values),
            part.values,
            part.returns,
            row.response_mask,
            value_clip_range=config.ppo.value_clip_range,
            num_tokens=num_tokens,
        )
        stats |= value_stats
    return policy, value, stats


def _text_pass(learner: Learner, texts: Sequence[PromptTree], coef: float) -> Sums:
    """Add coef times the gradient of the mean language modelling loss.

    Gradients that are not in shards are synchronised later, with those of the episodes.
    """
    if not texts:
        return {}
    accelerator = learner.accelerator
    own_tokens = sum(len(response) for tree in texts for response in tree.responses)
    num_tokens = int(sum_over_processes(accelerator, own_tokens))
    rows = learner.packer.rows(texts)
    num_passes = max_over_processes(accelerator, len(rows))
    sums: dict[str, Tensor] = {}
    for number in range(num_passes):
        row = rows[min(number, len(rows) - 1)].to(accelerator.device)
        weight = float(number < len(rows))  # as in _episode_pass
        is_last = number == num_passes - 1 and sharding.shards_gradients(accelerator)
        with sharding.one_pass(accelerator, learner.model, is_last=is_last):
            logprobs, _ = learner.model(row, with_values=False)
            nats = -logprobs.sum()
            loss = nats * (weight * coef * accelerator.num_processes / num_tokens)
            sharding.backward(accelerator, learner.model, loss)
        _add(sums, {"ptx_nats": nats}, scale=weight)
    return {"ptx_tokens": float(own_tokens), "ptx_nats": float(sums["ptx_nats"])}


@dataclass(frozen=True)
class RowBatch:
    """Holds what the losses need for one packed row, each (responses of the row, time)."""

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(cls, batch: Rollout, row: PackedRow) -> "RowBatch":
        names = cls.__dataclass_fields__
        return cls(**{name: row.select(getattr(batch, name).to(row.device)) for name in names})


def find_nonfinite(learner: Learner, batch: Rollout, texts: Sequence[PromptTree]) -> NonFiniteError:
    """Find what made a gradient NaN or infinite, on all processes.

    Repeats the step's passes row by row, without gradients.
    """
    with sharding.whole_weights(learner.accelerator, learner.model):
        own = _find_nonfinite(learner, batch, texts)
    step = learner.schedule.last_epoch
    return found_by_any(own) or NonFiniteError("gradient", "train", step=step)


def _find_nonfinite(
    learner: Learner, batch: Rollout, texts: Sequence[PromptTree]
) -> NonFiniteError | None:
    step = learner.schedule.last_epoch
    for trees, phase in ((batch.trees, "train"), (texts, "ptx")):
        for row in learner.packer.rows(trees):
            on_device = row.to(learner.accelerator.device)
            with torch.no_grad():
                logprobs, values = learner.models(on_device, with_values=phase == "train")
            assert logprobs is not None
            tensors = {"logprobs": row.unpack(logprobs.cpu())}
            if values is not None:
                tensors |= {"values": row.unpack(values.cpu())}
            of_row = [trees[i] for i in row.tree_index.tolist()]
            found = first_nonfinite(tensors, of_row, phase, step)
            if found is not None:
                return found
    return None


def _set_aside(learner: Learner, watched: Sequence[nn.Parameter]) -> list[Tensor]:
    """Copy the text's gradient; where gradients are in shards, also set them to zero.

    DeepSpeed may or may not add later gradients to those that are there.
    """
    text = [gradient.clone() for gradient in sharding.local_gradients(watched)]
    if text and sharding.shards_gradients(learner.accelerator):
        trained = trained_parameters(learner.models).values()
        sharding.zero_gradients(learner.accelerator, learner.model, trained)
    return text


def _balance(
    learner: Learner, parameters: Sequence[nn.Parameter], text: list[Tensor], config: Config
) -> Sums:
    """Measure the norms and the cosine of the policy's two gradients; give them the wanted ratio.

    Args:
        parameters: hold the sum of both gradients over all processes. Where gradients are in
            shards, they hold the episodes' gradient alone. Empty: nothing is measured.
        text: this process's gradient of the text, or its shard of that gradient.
    """
    if not parameters:
        return {}
    accelerator = learner.accelerator
    ppo = sharding.local_gradients(parameters)
    if not sharding.shards_gradients(accelerator):
        if accelerator.num_processes > 1:
            text = [accelerator.reduce(gradient, reduction="mean") for gradient in text]
        ppo = [total - part for total, part in zip(ppo, text, strict=True)]
    text_norm, ppo_norm = (sharding.norm(accelerator, gradient) for gradient in (text, ppo))
    # 1e-30 stands in for a norm of 0, which cannot divide.
    cosine = sharding.dot(accelerator, text, ppo) / max(text_norm * ppo_norm, 1e-30)
    coef, scale = config.ptx.coef, 1.0
    if config.ptx.grad_norm_ratio is not None:
        coef = scale = config.ptx.grad_norm_ratio * ppo_norm / max(text_norm, 1e-30)
    if scale != 1.0 or sharding.shards_gradients(accelerator):
        total = [own.add_(part, alpha=scale) for own, part in zip(ppo, text, strict=True)]
        sharding.set_local_gradients(parameters, total)
    norms = {"ptx_norm": text_norm * scale, "ppo_norm": ppo_norm}
    return {**norms, "cosine": cosine, "ptx_coef": coef}


def _add(sums: dict[str, Tensor], more: Mapping[str, Tensor], scale: float = 1.0) -> None:
    """Add values to the sums on their own device, so that the next row need not wait for a GPU."""
    for name, value in more.items():
        scaled = value.detach() * scale
        sums[name] = sums[name] + scaled if name in sums else scaled
