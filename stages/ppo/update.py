"""The update: clipped policy and value steps, with the gradient of the text loss summed in."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.distributed import max_over_processes, sum_over_processes
from rlhf.kl import k1
from rlhf.logprobs import token_logprobs
from rlhf.losses import policy_loss, value_loss
from rlhf.models import ScalarModel, response_logits
from rlhf.optim import MovingAverage, gradients
from rlhf.packing import PackedRow, Packer, PromptTree
from stages.ppo.config import Config
from stages.ppo.rollout import Rollout

Sums = dict[str, float]
"""Sums over this process's tokens and steps."""

FIRST_STEP_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Log-ratio, in nats a token, above which a difference is no longer noise of the arithmetic."""


class PolicyAndValue(nn.Module):
    """Both trained models as one module, since DeepSpeed and FSDP wrap only one per Accelerator."""

    def __init__(self, policy: PreTrainedModel, value_model: ScalarModel) -> None:
        super().__init__()
        self.policy = policy
        self.value_model = value_model

    def forward(self, row: PackedRow, with_values: bool = True) -> tuple[Tensor, Tensor | None]:
        """Logits (tokens, vocab) and values (tokens,) at every response token of a packed row."""
        logits = response_logits(self.policy, row)
        if not with_values:
            return logits, None
        return logits, self.value_model(row.predictors, **row.model_inputs)


@dataclass
class Learner:
    """What an update changes: the models, their optimizer, schedule and moving average."""

    model: nn.Module
    """PolicyAndValue, as the accelerator wrapped it"""
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    average: MovingAverage | None
    packer: Packer
    accelerator: Accelerator

    @property
    def models(self) -> PolicyAndValue:
        return self.accelerator.unwrap_model(self.model)


def update(
    learner: Learner,
    rollout: Rollout,
    texts: Iterator[list[PromptTree]],
    config: Config,
    generator: torch.Generator,
) -> dict[str, float]:
    """All optimizer steps on one rollout; returns metrics over its tokens and steps.

    Args:
        texts: gives the text blocks of one step at a time; empty lists without ptx.
        generator: of the order of episodes.
    """
    total: Sums = {}
    for _ in range(config.ppo.num_epochs):
        order = torch.randperm(len(rollout.trees), generator=generator)
        for episodes in order.split(_own_mini_batch(config, learner.accelerator)):
            step = optimizer_step(learner, rollout.select(episodes), next(texts), config)
            max_log_ratio = step.pop("max_log_ratio")
            if not total:
                _check_ratio(max_log_ratio, learner.models.policy.dtype)
            for name, value in step.items():
                total[name] = total.get(name, 0.0) + value
    return update_metrics(
        {k: float(sum_over_processes(learner.accelerator, v)) for k, v in total.items()}
    )


def optimizer_step(
    learner: Learner, batch: Rollout, texts: Sequence[PromptTree], config: Config
) -> Sums:
    """One step on a mini-batch and its text: gradients of both are summed, then the step is taken.

        loss = policy_loss + value_loss + ptx.coef * (mean nats a text token)

    The first two are means over the response tokens of the mini-batch on all processes. Policy and
    value model share no weight, so the value loss needs no coefficient.
    """
    accelerator = learner.accelerator
    learner.optimizer.zero_grad()
    sums: Sums = {"steps": 1.0}
    sums |= _text_pass(learner, texts, config.ptx.coef)
    watched = list(learner.models.policy.parameters()) if _watch_gradients(config, texts) else []
    ptx_gradients = [gradient.clone() for gradient in gradients(watched)]
    sums |= _episode_pass(learner, batch, config)
    sums |= _gradient_sums(ptx_gradients, list(gradients(watched)))
    for name, module in (
        ("policy_grad_norm", learner.models.policy),
        ("value_grad_norm", learner.models.value_model),
    ):
        norm = accelerator.clip_grad_norm_(module.parameters(), config.optim.max_grad_norm)
        sums[name] = float(norm)
    learner.optimizer.step()
    learner.schedule.step()
    if learner.average is not None:
        learner.average.update(learner.models.policy)
    return sums


def _episode_pass(learner: Learner, batch: Rollout, config: Config) -> Sums:
    """Adds the gradient of the policy and the value loss; the last pass synchronises processes."""
    accelerator, ppo = learner.accelerator, config.ppo
    num_tokens = int(sum_over_processes(accelerator, batch.response_mask.sum()))
    rows = learner.packer.rows(batch.trees)
    num_passes = max_over_processes(accelerator, len(rows))
    sums: Sums = {"tokens": float(batch.response_mask.sum()), "max_log_ratio": 0.0}
    for number in range(num_passes):
        row = rows[min(number, len(rows) - 1)].to(accelerator.device)
        weight = float(number < len(rows))  # a process with fewer rows repeats one at weight 0
        part = RowBatch.of(batch, row)
        with _synchronise(learner, number == num_passes - 1):
            logits, values = learner.model(row)
            logprobs = token_logprobs(logits, row.targets, config.rollout.temperature)
            policy, policy_stats = policy_loss(
                row.unpack(logprobs),
                part.logprobs,
                part.advantages,
                row.response_mask,
                clip_range=ppo.clip_range,
                num_tokens=num_tokens,
            )
            value, value_stats = value_loss(
                row.unpack(values),
                part.values,
                part.returns,
                row.response_mask,
                value_clip_range=ppo.value_clip_range,
                num_tokens=num_tokens,
            )
            accelerator.backward((policy + value) * weight * accelerator.num_processes)
        if weight:
            _add(sums, {"policy_loss": policy, "value_loss": value}, scale=num_tokens)
            sums["max_log_ratio"] = max(
                sums["max_log_ratio"], float(policy_stats.pop("max_log_ratio"))
            )
            _add(sums, policy_stats | value_stats)
    return sums


def _text_pass(learner: Learner, texts: Sequence[PromptTree], coef: float) -> Sums:
    """Adds coef times the gradient of the mean language modelling loss; not yet synchronised."""
    if not texts:
        return {}
    accelerator = learner.accelerator
    own_tokens = sum(len(response) for tree in texts for response in tree.responses)
    num_tokens = int(sum_over_processes(accelerator, own_tokens))
    sums: Sums = {"ptx_tokens": float(own_tokens)}
    for row_on_cpu in learner.packer.rows(texts):
        row = row_on_cpu.to(accelerator.device)
        with _synchronise(learner, False):
            logits, _ = learner.model(row, with_values=False)
            nats = -token_logprobs(logits, row.targets).sum()
            accelerator.backward(nats * (coef * accelerator.num_processes / num_tokens))
        _add(sums, {"ptx_nats": nats})
    return sums


@dataclass(frozen=True)
class RowBatch:
    """What the losses need of the rollout for one packed row, each (responses of the row, time)."""

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(cls, batch: Rollout, row: PackedRow) -> "RowBatch":
        names = cls.__dataclass_fields__
        return cls(**{name: row.select(getattr(batch, name).to(row.device)) for name in names})


def update_metrics(total: Sums) -> dict[str, float]:
    """Means over the tokens and the steps of an update."""
    tokens, steps = total["tokens"], total["steps"]
    metrics = {
        "ppo/policy_loss": total["policy_loss"] / tokens,
        "ppo/value_loss": total["value_loss"] / tokens,
        "ppo/approx_kl": total["approx_kl"] / tokens,
        "ppo/clip_fraction": total["clipped"] / tokens,
        "ppo/value_clip_fraction": total["value_clipped"] / tokens,
        "ppo/ratio": total["ratio"] / tokens,
        "ppo/policy_grad_norm": total["policy_grad_norm"] / steps,
        "ppo/value_grad_norm": total["value_grad_norm"] / steps,
    }
    if "ptx_tokens" in total:
        metrics["ppo/ptx_loss"] = total["ptx_nats"] / total["ptx_tokens"]
    if "ptx_norm" in total:
        metrics["ppo/ptx_grad_norm"] = total["ptx_norm"] / steps
        metrics["ppo/ppo_grad_norm"] = total["ppo_norm"] / steps
        metrics["ppo/grad_cosine"] = total["cosine"] / steps
    return metrics


def check_start(rollout: Rollout, dtype: torch.dtype) -> None:
    """Before the first update the policy is its reference, so their KL is 0 on every token.

    Raises:
        ValueError: it is not, so every later KL would be wrong too.
    """
    kl = k1(rollout.logprobs, rollout.ref_logprobs, rollout.response_mask).abs().max().item()
    if kl > FIRST_STEP_TOLERANCE[dtype]:
        raise ValueError(
            f"before the first update the policy differs from its reference by {kl:.2g} nats on a "
            f"token (noise stays below {FIRST_STEP_TOLERANCE[dtype]:g}); both must be loaded from "
            "one folder, in one dtype, with dropout off"
        )


def _check_ratio(max_log_ratio: float, dtype: torch.dtype) -> None:
    """In the first step on a rollout the policy is still the one that sampled: the ratio is 1."""
    if max_log_ratio > FIRST_STEP_TOLERANCE[dtype]:
        raise ValueError(
            f"in the first step on a rollout the log-ratio of new to old probability reaches "
            f"{max_log_ratio:.2g} (noise stays below {FIRST_STEP_TOLERANCE[dtype]:g}); dropout or "
            "mixed precision differs between the rollout and the training pass"
        )


def _gradient_sums(ptx: Sequence[Tensor], both: Sequence[Tensor]) -> Sums:
    """Norms of the ptx and of the PPO gradient of the policy, and their cosine.

    Under several processes the ptx part is this process's before they are averaged.
    """
    if not ptx:
        return {}
    ppo = [total - part for total, part in zip(both, ptx, strict=True)]
    ptx_norm, ppo_norm = _norm(ptx), _norm(ppo)
    product = sum(float((a * b).sum()) for a, b in zip(ptx, ppo, strict=True))
    cosine = product / max(ptx_norm * ppo_norm, 1e-30)
    return {"ptx_norm": ptx_norm, "ppo_norm": ppo_norm, "cosine": cosine}


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([tensor.norm() for tensor in tensors]).norm())


def _watch_gradients(config: Config, texts: Sequence[PromptTree]) -> bool:
    return bool(texts) and config.ptx.gradient_norms


def _own_mini_batch(config: Config, accelerator: Accelerator) -> int:
    return config.ppo.mini_batch_size // accelerator.num_processes


def _synchronise(learner: Learner, last: bool) -> AbstractContextManager[None]:
    """Gradients are exchanged between processes in the last pass of a step only."""
    return nullcontext() if last else learner.accelerator.no_sync(learner.model)


def _add(sums: Sums, more: Mapping[str, Tensor], scale: float = 1.0) -> None:
    for name, value in more.items():
        sums[name] = sums.get(name, 0.0) + float(value.detach()) * scale
