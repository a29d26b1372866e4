"""Where a score comes from: reward models, functions of the user's, and sums of them.

All answer `score(...)` with what each response is worth before the KL penalty (`Scored`). What
follows are pure functions of scores, applied by the caller in this order:

    scores = clip_scores(scores, settings.clip)
    scores = penalize_length(scores, lengths, ...)
    scores = adjust_missing_end(scores, finished_mask, ...)

The clip comes first, or it could swallow the penalties.
"""

from rlhf.rewards.combined import EnsembleReward, NormalizedReward, WeightedReward
from rlhf.rewards.functions import (
    FunctionReward,
    TokenFunctionReward,
    call_by_rows,
    load_function,
    row_name,
)
from rlhf.rewards.load import load_judge, load_reward, reward_models_of
from rlhf.rewards.models import (
    NUM_GOLDEN,
    REWARD_FILE,
    GoldenRow,
    RewardCard,
    RewardModel,
    TextRewardModel,
    load_reward_model,
    load_value_model,
    measured_dtype,
    trees_of,
)
from rlhf.rewards.rendering import (
    check_rendering,
    rendering_hash,
    same_rendering,
    same_vocabulary,
)
from rlhf.rewards.scores import (
    Reward,
    Scored,
    adjust_missing_end,
    clip_scores,
    combine_members,
    penalize_length,
    spread,
)
from rlhf.rewards.settings import EnsembleSettings, PartSettings, RewardSettings

__all__ = [
    "NUM_GOLDEN",
    "REWARD_FILE",
    "EnsembleReward",
    "EnsembleSettings",
    "FunctionReward",
    "GoldenRow",
    "NormalizedReward",
    "PartSettings",
    "Reward",
    "RewardCard",
    "RewardModel",
    "RewardSettings",
    "Scored",
    "TextRewardModel",
    "TokenFunctionReward",
    "WeightedReward",
    "adjust_missing_end",
    "call_by_rows",
    "check_rendering",
    "clip_scores",
    "combine_members",
    "load_function",
    "load_judge",
    "load_reward",
    "load_reward_model",
    "load_value_model",
    "measured_dtype",
    "penalize_length",
    "rendering_hash",
    "reward_models_of",
    "row_name",
    "same_rendering",
    "same_vocabulary",
    "spread",
    "trees_of",
]
