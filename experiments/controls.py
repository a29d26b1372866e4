"""Give rewards for the controls: runs in which PPO must not improve anything.

With a constant reward nothing may drift beyond noise. With the sign of a reward model flipped, gold
must fall. `python -m experiments.sweep` evaluates both next to the other policies:

    python -m stages.ppo --config configs/ppo/tiny.yaml --ptx.coef 0 --reward.model null \
        --reward.function experiments.controls:constant --output_dir runs/tiny/controls/constant
    python -m stages.ppo --config configs/ppo/tiny.yaml --ptx.coef 0 --reward.model null \
        --reward.parts '{"flipped": {"model": "runs/tiny/rm", "weight": -1}}' \
        --output_dir runs/tiny/controls/flipped
"""

from collections.abc import Sequence
from typing import Any

from rlhf.inputs.records import PromptLike


def constant(
    prompts: Sequence[PromptLike], responses: Sequence[str], metas: Sequence[dict[str, Any]]
) -> list[float]:
    """Return the same reward for every response."""
    return [1.0] * len(responses)
