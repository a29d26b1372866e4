"""Load the models of a run: the two that learn, and those that a rollout reads."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from rlhf.generation.engines import make_engine
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import Packer
from rlhf.models.full import checkpoint_activations
from rlhf.models.layout import packer_for
from rlhf.models.limits import check_context, check_vocabulary
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_bases import SharedBases, weight_bytes
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.load import load_reward, reward_models_of
from rlhf.rewards.models import load_value_model
from rlhf.rewards.rendering import same_vocabulary
from rlhf.rewards.scores import Reward
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training import sharding
from rlhf.training.optim import MovingAverage
from rlhf.training.step import TrainState, make_train_state
from stages.ppo.config import Config
from stages.ppo.learner import POLICY, Learner, PolicyAndValue
from stages.ppo.rollout import RolloutWorker


def load_models(
    config: Config, chat: Chat, accelerator: Accelerator, stopwatch: Stopwatch
) -> tuple[Learner, RolloutWorker]:
    """Load policy, value model, reference and reward, and print the memory of their weights."""
    engine = make_engine(config.generation)
    bases = _shared_bases(config, accelerator)
    policy = load_policy(config.policy, config.lora, bases)
    check_vocabulary(policy, chat, config.policy.path)
    limits = {
        "rollout.max_prompt_tokens": config.rollout.max_prompt_tokens,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
    }
    check_context(policy, config.policy.path, limits)
    value_model = make_value_model(config, chat, accelerator, bases)
    log = accelerator.print
    autocast = partial(sharding.autocast_unwrapped, accelerator)
    reward = load_reward(
        config.reward,
        chat,
        accelerator.device,
        config.micro_batch_tokens,
        log,
        bases,
        offload=config.offload,
        autocast=autocast,
    )
    of_reference = config.policy
    if sharding.computes_on_half_weights(accelerator) and bases is None:
        # The reference must match the policy, and takes half the memory.
        of_reference = replace(of_reference, dtype="bfloat16")
    ref_policy = load_policy(of_reference, bases=bases).requires_grad_(False)
    if not config.offload:
        ref_policy.to(accelerator.device)
    _announce_weights(config, accelerator, [policy, value_model, ref_policy], reward)
    if config.gradient_checkpointing:
        checkpoint_activations(policy)
        checkpoint_activations(value_model.classifier)
    groups = [(policy, config.optim.learning_rate), (value_model, config.value_learning_rate)]
    first_steps = {POLICY: config.value_warmup_steps}
    both = PolicyAndValue(policy, value_model)
    state = make_train_state(both, groups, config.optim, config.num_steps, accelerator, first_steps)
    if config.ema_decay is not None:
        state.average = MovingAverage(policy, config.ema_decay)
    packer = _common_packer(state, config.micro_batch_tokens)
    learner = Learner(state, packer, stopwatch)
    worker = RolloutWorker(
        chat, ref_policy, reward, packer, config, stopwatch, engine, log, autocast
    )
    return learner, worker


def _common_packer(state: TrainState[PolicyAndValue], micro_batch_tokens: int) -> Packer:
    """Return the packer that both models can read, since both read the same rows."""
    packers = []
    for model in (state.module.policy, state.module.value_model.classifier):
        whole = sharding.whole_weights(state.accelerator, state.model, model)
        with whole, state.accelerator.autocast():
            packers.append(packer_for(model, micro_batch_tokens))
    return min(packers, key=lambda packer: packer.layout)


def _shared_bases(config: Config, accelerator: Accelerator) -> SharedBases | None:
    """Return the store of frozen weights that models share, or None where each has its own.

    Without adapters all weights are trained. ZeRO-3 and FSDP split the trained models' weights,
    which frozen models need whole.
    """
    plugin = accelerator.state.deepspeed_plugin
    is_sharded = accelerator.distributed_type == DistributedType.FSDP or (
        plugin is not None and plugin.zero_stage == 3
    )
    if not config.lora.rank or is_sharded:
        return None
    return SharedBases(accelerator.device, config.lora.quantize)


def _announce_weights(
    config: Config, accelerator: Accelerator, roles: Sequence[nn.Module], reward: Reward
) -> None:
    """Print the memory of the weights, and which reward models share none with the policy."""
    reward_models = reward_models_of(reward)
    held = weight_bytes(*roles, *reward_models)
    alone = sum(weight_bytes(model) for model in [*roles, *reward_models])
    saved = f", {alone / 1e6:.1f} MB if each held its own" if alone > held else ""
    accelerator.print(
        f"ppo: weights of policy, value, reference and reward models: {held / 1e6:.1f} MB{saved}"
    )
    policy = roles[0]
    for path, model in zip(config.reward.model_paths.values(), reward_models, strict=True):
        together = weight_bytes(policy, model)
        if config.lora.rank and together == weight_bytes(policy) + weight_bytes(model):
            accelerator.print(
                f"ppo: the reward model {path} is no adapter over the policy's base in its type "
                "and attention, so its weights are its own"
            )


def make_value_model(
    config: Config, chat: Chat, accelerator: Accelerator, bases: SharedBases | None
) -> ScalarModel:
    """Start the value model from the reward model (Ouyang et al. 2022, C.4) if there is one.

    Otherwise put a head of zeros on the policy's body. A random head would give a random baseline
    (openai/lm-human-preferences).

    Raises:
        ValueError: the folder that value_model names has another vocabulary than the policy.
    """
    start = config.reward.value_start if config.value_model is None else (config.value_model, 1.0)
    if start is not None:
        path, weight = start
        settings = config.value_settings(path)
        if same_vocabulary(chat, load_chat(settings)):
            value_model = load_value_model(settings, config.lora, bases)
            check_vocabulary(value_model.classifier, chat, path)
            value_model.scale *= weight
            return value_model
        if config.value_model is not None:
            raise ValueError(
                f"value_model {path} has another vocabulary than the policy {config.policy.path}, "
                "whose tokens it must read; give a reward model with the policy's tokenizer, or "
                "null for a new head on the policy's body"
            )
        accelerator.print(
            f"ppo: the reward model {path} has another vocabulary than the policy, so the value "
            "model starts as the policy's body with a new head of zeros"
        )
    value_model = load_scalar(config.policy, new_head=True, lora=config.lora, bases=bases)
    torch.nn.init.zeros_(value_model.head.weight)
    return value_model
