"""Bring scores to a common scale before the first update."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice

import torch
from accelerate import Accelerator

from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.records import Prompt
from rlhf.inputs.streams import torch_stream
from rlhf.models.scalar import ScalarModel
from rlhf.rewards.combined import NormalizedReward
from rlhf.training.nonfinite import told_by_all
from rlhf.training.processes import own_share, sum_over_processes
from stages.ppo.rollout import Sampler

SMALLEST_STD = 1e-6
"""Smallest standard deviation that is not rounding, relative to the mean or to 1, whichever is
larger."""


def normalize_scores(
    sampler: Sampler,
    value_model: ScalarModel,
    prompts: Sequence[FittedPrompt[Prompt]],
    accelerator: Accelerator,
    known: Mapping[str, float] | None = None,
) -> tuple[Sampler, dict[str, float]]:
    """Shift and scale the reward so that samples of the reference policy score 0 on average, with a
    standard deviation of 1 (Ziegler et al. 2019). Then a KL coefficient means the same for every
    reward.

    The value model gets the same shift and scale, so that it stays in the units of the scores. A
    head of zeros is left alone: it predicts 0, which is the mean of the new scores.

    Args:
        value_model: its bias and scale are changed in place.
        prompts: prompts to draw reward.normalize_on samples from, in an order set by the seed.
            The order starts again when all were drawn. The number is rounded up to one that all
            processes can share equally.
        known: mean and standard deviation found when a resumed run began. None: measure them.

    Returns:
        the sampler with the normalised reward, and the mean and standard deviation for
        results.json. Where reward.normalize_on is None, the same sampler and an empty dict.

    Raises:
        ValueError: all samples have the same score.
    """
    if sampler.config.reward.normalize_on is None:
        return sampler, {}
    if known is None:
        mean, std = _find_scale(sampler, prompts, accelerator)
    else:
        mean, std = known["raw_score_mean"], known["raw_score_std"]
    if value_model.head.weight.any():
        value_model.bias += mean / value_model.scale
        value_model.scale /= std
    normalized = replace(sampler, reward=NormalizedReward(sampler.reward, mean, std))
    return normalized, {"raw_score_mean": mean, "raw_score_std": std}


def _find_scale(
    sampler: Sampler, prompts: Sequence[FittedPrompt[Prompt]], accelerator: Accelerator
) -> tuple[float, float]:
    """Measure the mean and standard deviation of the raw scores, and print them."""
    config = sampler.config
    assert config.reward.normalize_on is not None
    count = accelerator.num_processes
    num_samples = math.ceil(config.reward.normalize_on / count) * count
    generator = torch_stream(config.seed, "ppo/normalize/prompts")
    order = torch.randperm(len(prompts), generator=generator)
    chosen = [prompts[i] for i in islice(cycle(order.tolist()), num_samples)]
    mean, std = _measure(sampler, own_share(accelerator, chosen), num_samples, accelerator)
    if std <= SMALLEST_STD * max(1.0, abs(mean)):
        raise ValueError(
            f"all {num_samples} samples for reward.normalize_on score {mean:.6g}, and a standard "
            "deviation of 0 cannot be scaled to 1; give a reward that tells responses apart, or "
            "reward.normalize_on null"
        )
    accelerator.print(
        f"ppo: {num_samples} samples of the reference policy score {mean:.4g} on average, with a "
        f"standard deviation of {std:.4g}; scores are shifted and scaled to 0 and 1"
    )
    return mean, std


def _measure(
    sampler: Sampler,
    prompts: Sequence[FittedPrompt[Prompt]],
    num_samples: int,
    accelerator: Accelerator,
) -> tuple[float, float]:
    """Return the mean and (biased) standard deviation of one sample's score for each prompt, over
    all processes."""
    generator = torch_stream(
        sampler.config.seed, "ppo/normalize/samples", accelerator.process_index
    )
    with accelerator.autocast(), told_by_all():
        with sampler.reference_at_hand():
            answers = sampler.sample(sampler.ref_policy, prompts, generator)
        scores = sampler.raw_scores(answers).scores.double()
    mean = float(sum_over_processes(accelerator, scores.sum())) / num_samples
    squares = float(sum_over_processes(accelerator, (scores - mean).square().sum()))
    return mean, math.sqrt(squares / num_samples)
