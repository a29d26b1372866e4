"""Bring scores to a common scale before the first update."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import cycle, islice

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.records import Prompt
from rlhf.inputs.streams import torch_stream
from rlhf.models.scalar import ScalarModel
from rlhf.rewards.combined import NormalizedReward
from rlhf.rewards.scores import ScoreScale
from rlhf.training.nonfinite import told_by_all
from rlhf.training.processes import own_share, sum_over_processes
from stages.ppo.rollout import Sampler

SMALLEST_STD = 1e-6
"""Smallest standard deviation that is not rounding, relative to the mean or to 1, whichever is
larger."""

LENGTH_FIELDS = ("per_token", "mean_tokens")
"""Fields of a ScoreScale that reward.debias_length measures."""


def normalize_scores(
    sampler: Sampler,
    value_model: ScalarModel,
    prompts: Sequence[FittedPrompt[Prompt]],
    accelerator: Accelerator,
    known: Mapping[str, float] | None = None,
) -> tuple[Sampler, dict[str, float]]:
    """Shift and scale the reward so that samples of the reference policy score 0 on average, with a
    standard deviation of 1 (Ziegler et al. 2019). Then a KL coefficient means the same for every
    reward. With reward.debias_length, the scores also lose what the length explains.

    The value model gets the same shift and scale, so that it stays in the units of the scores. A
    head of zeros is left alone: it predicts 0, which is the mean of the new scores.

    Args:
        value_model: its bias and scale are changed in place.
        prompts: prompts to draw reward.normalize_on samples from, in an order set by the seed.
            The order starts again when all were drawn. The number is rounded up to one that all
            processes can share equally.
        known: the scale found when a resumed run began. None: measure it.

    Returns:
        the sampler with the normalised reward, and the scale for results.json. Where
        reward.normalize_on is None, the same sampler and an empty dict.

    Raises:
        ValueError: all samples have the same score; or, with reward.debias_length, the two answers
            to each prompt have the same length.
    """
    if sampler.config.reward.normalize_on is None:
        return sampler, {}
    if known is None:
        scale = _find_scale(sampler, prompts, accelerator)
    else:
        scale = ScoreScale(**{name: known[f"raw_score_{name}"] for name in _names(sampler)})
    if value_model.head.weight.any():
        value_model.bias += scale.mean / value_model.scale
        value_model.scale /= scale.std
    normalized = replace(sampler, reward=NormalizedReward(sampler.reward, scale))
    return normalized, {f"raw_score_{name}": getattr(scale, name) for name in _names(sampler)}


def _names(sampler: Sampler) -> tuple[str, ...]:
    """Return which fields of the scale are measured."""
    return ("mean", "std", *(LENGTH_FIELDS if sampler.config.reward.debias_length else ()))


def _find_scale(
    sampler: Sampler, prompts: Sequence[FittedPrompt[Prompt]], accelerator: Accelerator
) -> ScoreScale:
    """Measure the scale of the raw scores, and print it."""
    settings = sampler.config.reward
    assert settings.normalize_on is not None
    per_prompt = 2 if settings.debias_length else 1
    count = per_prompt * accelerator.num_processes
    num_samples = math.ceil(settings.normalize_on / count) * count
    generator = torch_stream(sampler.config.seed, "ppo/normalize/prompts")
    order = torch.randperm(len(prompts), generator=generator)
    chosen = [prompts[i] for i in islice(cycle(order.tolist()), num_samples // per_prompt)]
    own = [prompt for prompt in own_share(accelerator, chosen) for _ in range(per_prompt)]
    scale = _measure(sampler, own, num_samples, accelerator)
    taken_out = (
        f" after {scale.per_token:+.3g} a token is taken out" if settings.debias_length else ""
    )
    if scale.std <= SMALLEST_STD * max(1.0, abs(scale.mean)):
        raise ValueError(
            f"all {num_samples} samples for reward.normalize_on score {scale.mean:.6g}{taken_out}, "
            "and a standard deviation of 0 cannot be scaled to 1; give a reward that tells "
            "responses apart, or reward.normalize_on null"
        )
    accelerator.print(
        f"ppo: {num_samples} samples of the reference policy score {scale.mean:.4g} on average, "
        f"with a standard deviation of {scale.std:.4g}{taken_out}; scores are shifted and scaled "
        "to 0 and 1"
    )
    return scale


def _measure(
    sampler: Sampler,
    prompts: Sequence[FittedPrompt[Prompt]],
    num_samples: int,
    accelerator: Accelerator,
) -> ScoreScale:
    """Return the scale of one sample's score for each of these prompts, over all processes.

    The standard deviation is the biased one. To take out the length, each prompt stands here
    twice in a row.
    """
    config = sampler.config
    generator = torch_stream(config.seed, "ppo/normalize/samples", accelerator.process_index)
    with accelerator.autocast(), told_by_all():
        with sampler.reference_at_hand():
            answers = sampler.sample(sampler.ref_policy, prompts, generator)
        scores = sampler.raw_scores(answers).scores.double()
    lengths = torch.tensor([float(len(one.response_ids)) for one in answers]).double()

    def total(values: Tensor) -> float:
        return float(sum_over_processes(accelerator, values.sum()))

    mean = total(scores) / num_samples
    if not config.reward.debias_length:
        return ScoreScale(mean=mean, std=math.sqrt(total((scores - mean).square()) / num_samples))
    longer, better = (values[::2] - values[1::2] for values in (lengths, scores))
    unlike = total(longer.square())
    if unlike == 0:
        raise ValueError(
            f"the two answers to each of {num_samples // 2} prompts have the same length, so "
            "nothing shows what a token is worth; set reward.debias_length to false, or raise "
            "rollout.max_new_tokens"
        )
    scale = ScoreScale(
        mean=mean,
        std=1.0,
        per_token=total(longer * better) / unlike,
        mean_tokens=total(lengths) / num_samples,
    )
    rest = scale.apply(scores, lengths)
    return replace(scale, std=math.sqrt(total(rest.square()) / num_samples))
