"""Plans the training of a reward model."""

import torch

from rlhf.measuring.allocations import DryRun
from rlhf.measuring.flops import work_of
from rlhf.models.full import checkpoint_activations
from stages.rm.config import Config
from tools.plan.launch import Launch
from tools.plan.models import settings_in_passes
from tools.plan.record import Plan
from tools.plan.rows import Rows, tree_of


def plan_rm(config: Config, launch: Launch, dry: DryRun) -> Plan:
    """Plan a pass over a full row of rankings with max_responses responses, or of pairs.

    A longer ranking is not cut, and needs more."""
    model = dry.scalar(settings_in_passes(config.model, launch), config.lora)
    if config.gradient_checkpointing:
        checkpoint_activations(model.classifier)
    plan = Plan(launch)
    dtype = getattr(torch, config.model.dtype)
    plan.load(model.classifier, dtype)
    plan.hold("reward model", model, dtype)
    plan.hold_optimizer("reward model", model)
    plan.hold_exchange(model)
    lengths = config.max_prompt_tokens, config.max_response_tokens
    num_responses = config.max_responses or 2
    rows = Rows.of(
        model.classifier, config.model.attention, config.micro_batch_tokens, launch.device
    )
    row = rows.of_episodes(*lengths, config.batch_size, num_responses)
    gradients = plan.gradients(model)
    a_pass = plan.add_pass("train", dry, row, (None, model), [model])
    plan.add_phase("step", gradients, launch.step(model))
    num_tokens = row.input_ids.numel()
    plan.parts |= {
        "gradients": gradients,
        f"pass of {num_tokens} tokens, forward and backward": a_pass,
    }
    plan.work = f"a pass of {num_tokens} tokens"
    ranking = tree_of(*lengths, num_responses)
    work = work_of([ranking]) * max(1, num_tokens // ranking.num_tokens)
    plan.add_training(model.classifier, work, is_checkpointed=config.gradient_checkpointing)
    return plan
