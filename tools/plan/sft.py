"""Plans supervised fine-tuning, which TRL's trainer runs."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.generation.engines import check_can_sample_alone
from rlhf.measuring.allocations import DryRun
from rlhf.measuring.flops import Work, text_work
from rlhf.models.full import checkpoint_activations
from rlhf.models.settings import ModelSettings
from rlhf.rewards.models import measured_dtype
from stages.sft.config import Config
from tools.plan.launch import Launch, bytes_of
from tools.plan.models import settings_in_passes, with_config
from tools.plan.record import Plan
from tools.plan.vllm import Vllm


def plan_sft(config: Config, launch: Launch, dry: DryRun) -> Plan:
    """Plan samples, and passes over padded batches of rows of the largest length."""
    policy = dry.policy(settings_in_passes(config.model, launch), config.lora)
    plan = Plan(launch)
    dtype = getattr(torch, config.model.dtype)
    plan.load(policy, dtype)
    plan.hold("policy", policy, dtype)
    plan.hold_optimizer("policy", policy)
    plan.hold_exchange(policy)
    if config.reward_model is not None:
        path = with_config(config.reward_model, config.model.path)
        settings = ModelSettings(path=path, dtype=measured_dtype(config.reward_model))
        reward_model = dry.scalar(settings).classifier
        plan.load(reward_model, reward_model.dtype, leaves=True)
        plan.held["reward model"] = bytes_of(reward_model.parameters())
    _plan_samples(plan, dry, config, policy)
    if config.gradient_checkpointing:
        checkpoint_activations(policy)
    rows = config.rows_per_pass(launch.num_processes)
    length = config.max_prompt_tokens + config.max_response_tokens
    existing, waiting = [], 0
    if config.batch_size > rows * launch.num_processes:
        existing = [policy]
        # The trainer exchanges gradients in the last pass of a step only, so FSDP2 keeps whole ones
        # until then. Our own steps exchange shards in every pass.
        waiting = launch.gradients_not_exchanged(policy) - launch.gradients(policy)
    a_pass = plan.add_pass_of(
        "train",
        lambda kept: _pass(dry, policy, rows, length, kept, launch.device),
        [policy],
        existing,
        waiting,
    )
    gradients = plan.gradients(policy)
    plan.add_phase("step", gradients, launch.step(policy))
    plan.parts |= {
        "gradients": gradients,
        "whole gradients between passes": gradients + waiting if waiting else 0,
        f"pass of {rows} x {length} tokens, forward and backward": a_pass,
    }
    plan.work = "an optimizer step"
    own_rows = config.batch_size // launch.num_processes
    work = Work(length, length, text_work(length).pairs) * own_rows
    plan.add_training(policy, work, is_checkpointed=config.gradient_checkpointing)
    return plan


def _plan_samples(plan: Plan, dry: DryRun, config: Config, policy: PreTrainedModel) -> None:
    """Add the samples, for which a launcher gathers the policy with either engine.

    They are drawn along the training if choose_by needs their scores. If not, they are drawn by the
    chosen policy alone, after the training."""
    launch, settings = plan.launch, config.generation
    lengths = config.max_prompt_tokens, config.max_response_tokens
    batch = min(settings.batch_size, config.num_samples)
    sampling, plan.parts["KV cache of the samples"] = dry.sampling(policy, batch, *lengths)
    gathered = launch.gathered(policy)
    plan.parts["weights gathered for samples"] = gathered
    if settings.engine == "hf":
        plan.add_phase("samples", gathered, sampling)
        return
    check_can_sample_alone(settings, launch.num_processes)
    dtype = dry.autocast or policy.dtype
    if config.reward_model is None:
        dtype = getattr(torch, config.model.dtype)  # no autocast any more
    vllm = Vllm.of(settings, launch, policy, dtype, dry)
    plan.parts |= vllm.parts
    if config.reward_model is None:
        chosen = bytes_of(policy.parameters(), dtype)
        plan.phases["samples"] = chosen + vllm.awake + vllm.handed_over
    else:  # it sleeps while the policy trains on
        plan.add_phase("samples", gathered, vllm.awake, vllm.handed_over)


def _pass(
    dry: DryRun,
    policy: PreTrainedModel,
    rows: int,
    length: int,
    accumulates: Sequence[nn.Module],
    device: str,
) -> int:
    """Measure a pass with TRL's fused head, or with all logits where the head cannot run.

    The operations of the head are a CPU's. A GPU's kernel works in place, so it needs less. The
    trainer also leaves out a head that gives other losses, which shows on real data only."""
    from stages.sft.trainer import head_of_trainer  # loads TRL, which takes seconds

    try:
        with head_of_trainer(policy, device):
            return dry.batch_training(policy, rows, length, accumulates, is_fused=True)
    except Exception:  # an architecture may fail in any way on the fused head
        return dry.batch_training(policy, rows, length, accumulates)
