"""Makes the models that settings name, without data, as their passes use them."""

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from rlhf.measuring.allocations import DryRun
from rlhf.models.adapters import CONFIG_FILE
from rlhf.models.full import checkpoint_activations
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import ModelSettings
from rlhf.rewards.models import measured_dtype
from stages.ppo.config import Config
from tools.plan.launch import Launch


@dataclass(frozen=True)
class Roles:
    """PPO's models, without data."""

    policy: PreTrainedModel
    value_model: ScalarModel
    reference: PreTrainedModel
    rewards: dict[str, ScalarModel]
    are_shared: bool
    """Whether they are adapters over common bases (`stages.ppo.load.load_models`)."""


def make_roles(config: Config, launch: Launch, dry: DryRun) -> Roles:
    """Make PPO's models, in the types of their passes."""
    are_shared = config.lora.rank > 0 and not launch.splits_weights
    # A base that adapters share keeps its type here; hold_on_base halves its bytes.
    in_passes = Launch() if are_shared else launch
    of_policy = settings_in_passes(config.policy, in_passes)
    of_value = settings_in_passes(value_settings(config), in_passes)
    of_rewards = {
        name: settings_in_passes(_reward_settings(config, path), Launch())
        for name, path in config.reward.model_paths.items()
    }
    roles = Roles(
        policy=dry.policy(of_policy, config.lora, is_shared=are_shared),
        value_model=dry.scalar(of_value, config.lora, is_shared=are_shared),
        reference=dry.policy(of_policy, is_shared=are_shared),
        rewards={
            name: dry.scalar(settings, is_shared=are_shared)
            for name, settings in of_rewards.items()
        },
        are_shared=are_shared,
    )
    if config.gradient_checkpointing:
        checkpoint_activations(roles.policy)
        checkpoint_activations(roles.value_model.classifier)
    return roles


def _reward_settings(config: Config, path: str) -> ModelSettings:
    return ModelSettings(
        path=with_config(path, config.policy.path),
        dtype=measured_dtype(path) if config.reward.dtype == "measured" else config.reward.dtype,
        attention=config.reward.attention,
        trust_remote_code=config.reward.trust_remote_code,
    )


def value_settings(config: Config) -> ModelSettings:
    """Return the value model's settings as the run would use them, with one exception.

    If a reward model has another vocabulary than the policy, the run takes the policy's body. The
    plan does not know vocabularies."""
    start = config.reward.value_start
    path = config.value_model or (None if start is None else start[0])
    if path is None or with_config(path, config.policy.path) == config.policy.path:
        return config.policy
    return config.value_settings(path)


def with_config(path: str, other: str) -> str:
    """Return a path that holds a config, or `other` for a reward model that is not yet trained."""
    files = ("config.json", CONFIG_FILE)
    return path if any((Path(path) / name).is_file() for name in files) else other


def settings_in_passes(settings: ModelSettings, launch: Launch) -> ModelSettings:
    """Return a model's settings as its passes use them.

    Flash attention and FlexAttention have no kernel here; sdpa without a mask saves the same
    tensors."""
    if launch.is_halved:
        settings = replace(settings, dtype="bfloat16")
    has_kernel = settings.attention in ("sdpa", "eager")
    return settings if has_kernel else replace(settings, attention="sdpa")
