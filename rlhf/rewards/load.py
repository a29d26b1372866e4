"""Loads and checks the reward that the settings describe."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from rlhf.inputs.chat import Chat
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import ModelSettings
from rlhf.models.shared_bases import SharedBases
from rlhf.rewards.combined import EnsembleReward, NormalizedReward, RewardPart, WeightedReward
from rlhf.rewards.functions import FunctionReward, TokenFunctionReward, load_function
from rlhf.rewards.models import RewardModel, TextRewardModel, load_reward_model, measured_dtype
from rlhf.rewards.rendering import same_rendering
from rlhf.rewards.scores import Reward
from rlhf.rewards.settings import RewardSettings


def load_reward(
    settings: RewardSettings,
    chat: Chat,
    device: torch.device | str,
    micro_batch_tokens: int,
    log: Callable[[str], object] = print,
    bases: SharedBases | None = None,
    offload: bool = False,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Reward:
    """Load the reward of these settings, checked and ready to score, but not yet normalised.

    Args:
        chat: The policy's rendering.
        micro_batch_tokens: The most tokens in one pass of a reward model.
        log: Called with a line for each reward model that reads text instead of the policy's ids.
        bases: Holds frozen weights for several models. None gives each model its own weights.
        device, offload, autocast: As in load_reward_model.

    Raises:
        ValueError: As in load_reward_model_for_policy and load_function.
    """

    def load(model: str | None, function: str | None, per_token: bool) -> Reward:
        if function is not None:
            found = load_function(function)
            if per_token:
                return TokenFunctionReward(found, function, chat)
            return FunctionReward(found, function)
        assert model is not None
        return load_reward_model_for_policy(
            ModelSettings(
                path=model,
                dtype=measured_dtype(model) if settings.dtype == "measured" else settings.dtype,
                attention=settings.attention,
                trust_remote_code=settings.trust_remote_code,
            ),
            chat,
            micro_batch_tokens=micro_batch_tokens,
            device=device,
            allow_chance_reward=settings.allow_chance_reward,
            log=log,
            bases=bases,
            offload=offload,
            autocast=autocast,
        )

    if settings.parts:
        return WeightedReward(
            {
                name: RewardPart(
                    load(part.model, part.function, part.per_token),
                    part.weight,
                    only_with=part.only_with,
                    only_without=part.only_without,
                )
                for name, part in settings.parts.items()
            }
        )
    ensemble = settings.ensemble
    if ensemble.models:
        members = [load(path, None, False) for path in ensemble.models]
        return EnsembleReward(members, ensemble.combine, ensemble.spread_coef)
    return load(settings.model, settings.function, settings.per_token)


def load_reward_model_for_policy(
    settings: ModelSettings,
    chat: Chat,
    *,
    micro_batch_tokens: int,
    device: torch.device | str = "cpu",
    allow_chance_reward: bool = False,
    log: Callable[[str], object] = print,
    bases: SharedBases | None = None,
    offload: bool = False,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Reward:
    """Load a reward model for a policy's responses.

    It reads the policy's ids if it renders text as the policy does, otherwise their text.

    Raises:
        ValueError: As in load_reward_model.
    """
    reward_model = load_reward_model(
        settings,
        micro_batch_tokens=micro_batch_tokens,
        device=device,
        allow_chance_reward=allow_chance_reward,
        bases=bases,
        offload=offload,
        autocast=autocast,
    )
    if same_rendering(chat, reward_model.chat):
        return reward_model
    log(
        f"the reward model reads text: {settings.path} has another tokenizer or chat template than "
        "the policy, so prompts and decoded responses are rendered anew for it"
    )
    return TextRewardModel(reward_model)


def reward_models_of(reward: Reward) -> list[ScalarModel]:
    """Return the models that a reward runs; none for a function."""
    match reward:
        case RewardModel():
            return [reward.model]
        case TextRewardModel():
            return [reward.reward_model.model]
        case NormalizedReward():
            return reward_models_of(reward.reward)
        case WeightedReward():
            members = [part.reward for part in reward.parts.values()]
        case EnsembleReward():
            members = list(reward.members)
        case _:
            return []
    return [model for member in members for model in reward_models_of(member)]
