"""Plans an update of PPO or PPO-ptx.

held       weights of all models; a base under several adapters counts once; Adam's two moments
           of each trained weight, in its type; the moving average, fp32; the buffers in which
           several processes exchange gradients
train      gradients of both models; the text's gradients if they are measured; a forward and
           backward pass over a row of micro_batch_tokens, through one model at a time if there
           is one process
ptx        gradients of the policy, and such a pass through it alone over text
step       gradients, the text's too; then the larger of two: PPO's own gradients to compare
           with the text's, or the optimizer's temporaries. On a CPU these are two copies of
           the largest weight. A GPU steps all weights of a model at once, and copies each
rollout    prompts of max_prompt_tokens read at once, or the last step with the whole cache; with
           vLLM its share of the GPU, and the weights that are gathered to copy them
others     a pass without gradient over a row of micro_batch_tokens
"""

import math

import torch
from torch import nn

from rlhf.inputs.packing import PackedRow
from rlhf.maths.logprobs import CHUNK_TOKENS
from rlhf.measuring.allocations import DryRun
from rlhf.measuring.flops import forward_flops, size_of, text_work, update_flops, work_of
from rlhf.models.scalar import ScalarModel
from rlhf.training.parameters import trained_parameters
from stages.ppo.config import Config
from tools.plan.launch import Launch, bytes_of
from tools.plan.models import Roles, make_roles, value_settings
from tools.plan.record import Plan, Turn
from tools.plan.rows import Rows, tree_of
from tools.plan.vllm import Vllm


def plan_ppo(config: Config, launch: Launch, dry: DryRun) -> Plan:
    """Plan an update of PPO: a rollout, and the steps on it."""
    roles = make_roles(config, launch, dry)
    plan = Plan(launch)
    _hold_roles(plan, roles, config)
    _plan_rollout(plan, dry, config, roles)
    _plan_training(plan, dry, config, roles)
    _add_flops(plan, config, roles)
    return plan


def _hold_roles(plan: Plan, roles: Roles, config: Config) -> None:
    launch = plan.launch
    trained = {"policy": roles.policy, "value model": roles.value_model.classifier}
    types = {"policy": config.policy.dtype, "value model": value_settings(config).dtype}
    frozen = {"reference": roles.reference}
    frozen |= {f"reward.{name}": model.classifier for name, model in roles.rewards.items()}
    if roles.are_shared:
        for name, model in (trained | frozen).items():
            plan.hold_on_base(name, model)
    else:
        for name, model in trained.items():
            plan.load(model, getattr(torch, types[name]))
        for name, model in frozen.items():
            if plan.load(model, model.dtype, leaves=not config.offload):
                plan.shared.add(name)
    for name, model in trained.items():
        if not roles.are_shared:
            plan.hold(name, model, getattr(torch, types[name]))
        plan.hold_optimizer(name, model)
    plan.hold_exchange(*trained.values())
    if config.ema_decay is not None:
        average = bytes_of(trained_parameters(roles.policy).values(), as_type=torch.float32)
        plan.held["policy: moving average"] = launch.share(average, launch.splits_weights)
    if not roles.are_shared:
        resting = plan.waiting if config.offload and launch.device != "cpu" else plan.held
        resting |= {name: bytes_of(model.parameters()) for name, model in frozen.items()}


def _plan_rollout(plan: Plan, dry: DryRun, config: Config, roles: Roles) -> None:
    """Add sampling and passes without gradient. Offloaded models return for their phase.

    A process holds one split model at a time (`stages.ppo.rollout.roll_out`)."""
    num_episodes = config.rollout.batch_size // plan.launch.num_processes
    batch = min(config.generation.batch_size, num_episodes)
    sampling, cache = dry.sampling(roles.policy, batch, *_lengths(config))
    plan.parts["KV cache of a rollout"] = cache
    row = _rows(config, plan.launch, roles).of_episodes(*_lengths(config), num_episodes)
    of_policy = plan.launch.gathered(roles.policy, roles.value_model)
    of_value = plan.launch.gathered(roles.value_model, roles.policy)
    if config.generation.engine == "vllm":
        dtype = dry.autocast or roles.policy.dtype
        vllm = Vllm.of(config.generation, plan.launch, roles.policy, dtype, dry)
        plan.parts |= vllm.parts
        plan.parts["weights gathered after sampling"] = of_policy
        plan.add_phase("rollout", vllm.awake, vllm.handed_over)
    else:
        plan.parts["weights gathered to sample"] = of_policy
        plan.add_phase("rollout", of_policy, sampling)
    plan.parts["weights gathered for values"] = of_value
    plan.add_phase("logprobs", of_policy, dry.moments(roles.policy, row))
    if roles.rewards:  # the phase brings all of them to the device
        visitors = sum(plan.waiting.get(f"reward.{name}", 0) for name in roles.rewards)
        passes = [
            dry.values(model, _reward_row(config, plan.launch, model, num_episodes))
            for model in roles.rewards.values()
        ]
        plan.add_phase("score", visitors, max(passes))
    visitor = plan.waiting.get("reference", 0)
    plan.add_phase("reference", visitor, dry.logprobs(roles.reference, row))
    plan.add_phase("value", of_value, dry.values(roles.value_model, row))


def _plan_training(plan: Plan, dry: DryRun, config: Config, roles: Roles) -> None:
    """Add the passes with gradient, over episodes and over text, and the optimizer's step."""
    launch, budget = plan.launch, config.micro_batch_tokens
    policy, value_model = roles.policy, roles.value_model
    rows = _rows(config, launch, roles)
    own_step = config.ppo.mini_batch_size // launch.num_processes
    own_blocks = math.ceil(config.text_blocks_per_step / launch.num_processes)
    row = rows.of_episodes(*_lengths(config), own_step)
    is_watched = config.ptx.gradient_norms or config.ptx.grad_norm_ratio is not None
    # Sharded gradients of the text are set aside even if nothing is measured.
    is_kept = is_watched or launch.splits_gradients
    of_text = launch.set_aside(policy) if own_blocks and is_kept else 0
    if own_blocks:
        blocks = rows.of_texts(config.ptx.block_tokens, own_blocks)
        is_one_row = own_blocks * config.ptx.block_tokens <= budget
        is_taught = config.ptx.targets == "reference"
        plan.add_pass(
            "ptx",
            dry,
            blocks,
            (policy, None),
            [] if is_one_row else [policy],
            plan.waiting.get("reference", 0) if is_taught else 0,
            teacher=roles.reference if is_taught else None,
        )
    is_one_row = own_step * sum(_lengths(config)) <= budget
    existing: list[nn.Module] = [policy] if own_blocks else []
    if not is_one_row:
        existing = [policy, value_model]
    turns: list[Turn] = [(policy, value_model)]
    if launch.is_alone:
        turns = [(policy, None), (None, value_model)]
    passes = []
    for turn in turns:
        passes.append(plan.add_pass("train", dry, row, turn, existing, of_text))
        existing = list({*existing, policy})
    comparing = of_text + _largest(policy) if of_text else 0
    kept = plan.gradients(policy, value_model)
    plan.add_phase("step", kept, of_text, max(comparing, launch.step(policy, value_model)))
    plan.parts |= {
        "gradients of policy and value model": kept,
        "gradients of the text": of_text,
        f"pass of {row.input_ids.numel()} tokens, forward and backward": max(passes),
        "  of it logits at a time": _logits_bytes(policy, min(CHUNK_TOKENS, len(row.targets))),
    }


def _add_flops(plan: Plan, config: Config, roles: Roles) -> None:
    num_episodes = config.rollout.batch_size // plan.launch.num_processes
    num_texts = math.ceil(config.text_blocks_per_step / plan.launch.num_processes)
    episodes = work_of([tree_of(*_lengths(config))]) * num_episodes
    texts = text_work(config.ptx.block_tokens) * (num_texts * config.steps_per_update)
    policy, value_model = size_of(roles.policy), size_of(roles.value_model.classifier)
    plan.flops = update_flops(
        policy,
        value_model,
        [size_of(model.classifier) for model in roles.rewards.values()],
        episodes,
        texts,
        config.ppo.num_epochs,
        is_taught=config.ptx.targets == "reference",
    )
    plan.flops["logprobs"] /= config.rollout.check_every  # the mean over updates
    if config.gradient_checkpointing:
        again = forward_flops(policy, episodes) + forward_flops(value_model, episodes)
        plan.flops["ptx"] += forward_flops(policy, texts)
        plan.flops["train"] += config.ppo.num_epochs * again


def _lengths(config: Config) -> tuple[int, int]:
    """Return the most tokens of a prompt and of a response."""
    return config.rollout.max_prompt_tokens, config.rollout.max_new_tokens


def _rows(config: Config, launch: Launch, roles: Roles) -> Rows:
    """Return the rows that both trained models can read, since both read the same."""
    models = (
        (roles.policy, config.policy.attention),
        (roles.value_model.classifier, value_settings(config).attention),
    )
    found = [Rows.of(*model, config.micro_batch_tokens, launch.device) for model in models]
    return min(found, key=lambda rows: rows.layout)


def _reward_row(config: Config, launch: Launch, model: ScalarModel, num_episodes: int) -> PackedRow:
    budget, attention = config.micro_batch_tokens, config.reward.attention
    rows = Rows.of(model.classifier, attention, budget, launch.device)
    return rows.of_episodes(*_lengths(config), num_episodes)


def _largest(model: nn.Module) -> int:
    return max(p.nbytes for p in trained_parameters(model).values())


def _logits_bytes(policy: nn.Module, tokens: int) -> int:
    """Return the bytes of the logits of some tokens, which are computed in fp32."""
    return 4 * tokens * policy.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
