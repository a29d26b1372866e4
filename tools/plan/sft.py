"""Plans supervised fine-tuning, which TRL's trainer runs."""

import torch

from rlhf.measuring.allocations import DryRun
from rlhf.measuring.flops import Work, text_work
from rlhf.models.full import checkpoint_activations
from rlhf.models.settings import ModelSettings
from stages.sft.config import Config
from tools.plan.launch import Launch, bytes_of
from tools.plan.models import logits_bytes, settings_in_passes, with_config
from tools.plan.record import Plan


def plan_sft(config: Config, launch: Launch, dry: DryRun) -> Plan:
    """Plan a padded batch with all of its logits, as TRL trains."""
    policy = dry.policy(settings_in_passes(config.model, launch), config.lora)
    plan = Plan(launch)
    plan.hold("policy", policy, getattr(torch, config.model.dtype))
    plan.hold_optimizer("policy", policy)
    plan.hold_exchange(policy)
    if config.reward_model is not None:
        path = with_config(config.reward_model, config.model.path)
        plan.held["reward model"] = bytes_of(dry.scalar(ModelSettings(path=path)).parameters())
    prompt, response = config.max_prompt_tokens, config.max_response_tokens
    batch = min(config.generation.batch_size, config.num_samples)
    sampling, plan.parts["KV cache of the samples"] = dry.sampling(policy, batch, prompt, response)
    gathered = launch.gathered(policy)
    plan.parts["weights gathered for samples"] = gathered
    plan.add_phase("samples", gathered, sampling)
    if config.gradient_checkpointing:
        checkpoint_activations(policy)
    rows = config.rows_per_pass(launch.num_processes)
    length = prompt + response
    gradients = plan.gradients(policy)
    existing = [policy] if config.batch_size > rows * launch.num_processes else []
    a_pass = plan.add_pass_of(
        "train", lambda kept: dry.batch_training(policy, rows, length, kept), [policy], existing
    )
    plan.add_phase("step", gradients, launch.step(policy))
    plan.parts |= {
        "gradients": gradients,
        f"pass of {rows} x {length} tokens, forward and backward": a_pass,
        "  of it logits": logits_bytes(policy, rows * length),
    }
    plan.work = "an optimizer step"
    own_rows = config.batch_size // launch.num_processes
    work = Work(length, length, text_work(length).pairs) * own_rows
    plan.add_training(policy, work, is_checkpointed=config.gradient_checkpointing)
    return plan
