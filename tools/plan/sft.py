"""Plans supervised fine-tuning, which TRL's trainer runs."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.measuring.allocations import DryRun
from rlhf.measuring.flops import Work, text_work
from rlhf.models.full import checkpoint_activations
from rlhf.models.settings import ModelSettings
from rlhf.rewards.models import measured_dtype
from stages.sft.config import Config
from tools.plan.launch import Launch, bytes_of
from tools.plan.models import settings_in_passes, with_config
from tools.plan.record import Plan


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
    prompt, response = config.max_prompt_tokens, config.max_response_tokens
    batch = min(config.generation.batch_size, config.num_samples)
    sampling, plan.parts["KV cache of the samples"] = dry.sampling(policy, batch, prompt, response)
    gathered = launch.gathered(policy)
    plan.parts["weights gathered for samples"] = gathered
    plan.add_phase("samples", gathered, sampling)
    if config.gradient_checkpointing:
        checkpoint_activations(policy)
    rows = config.rows_per_pass(launch.num_processes)
    length = config.max_prompt_tokens + config.max_response_tokens
    existing, waiting = [], 0
    if config.batch_size > rows * launch.num_processes:
        existing = [policy]
        # The trainer exchanges gradients in the last pass of a step only, so FSDP2 keeps whole ones
        # until then. Our own steps exchange shards in every pass.
        waiting = launch.gradients_not_exchanged(policy) - plan.gradients(policy)
    a_pass = plan.add_pass_of(
        "train", lambda kept: _pass(dry, policy, rows, length, kept), [policy], existing, waiting
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


def _pass(
    dry: DryRun, policy: PreTrainedModel, rows: int, length: int, accumulates: Sequence[nn.Module]
) -> int:
    """Measure a pass with TRL's fused head, or with all logits where the head cannot run.

    The operations of the head are a CPU's. A GPU's kernel works in place, so it needs less. The
    trainer also leaves out a head that gives other losses, which shows on real data only."""
    from stages.sft.trainer import add_head_of_trainer  # loads TRL, which takes seconds

    original = policy.forward
    try:
        add_head_of_trainer(policy)
        return dry.batch_training(policy, rows, length, accumulates, is_fused=True)
    except Exception:  # an architecture may fail in any way on the fused head
        policy.forward = original
        return dry.batch_training(policy, rows, length, accumulates)
