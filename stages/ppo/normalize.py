"""Bring scores to a common scale before the first update."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.records import Prompt
from rlhf.inputs.streams import torch_stream
from rlhf.models.scalar import ScalarModel
from rlhf.rewards.combined import NormalizedReward, WeightedReward
from rlhf.rewards.scores import Reward, ScoreScale
from rlhf.rewards.settings import RewardSettings
from rlhf.training.nonfinite import first_nonfinite, raised_in_all_processes
from rlhf.training.processes import own_share, sum_over_processes
from stages.ppo.rollout import Gather, RolloutWorker

SMALLEST_STD = 1e-6
"""Smallest standard deviation that is not rounding, relative to the mean or to 1, whichever is
larger."""

LENGTH_FIELDS = ("per_token", "mean_tokens")
"""Fields of a ScoreScale that debias_length measures."""

WHOLE = ""
"""Stands in the place of a part's name for a reward that has no parts."""


def normalize_scores(
    worker: RolloutWorker,
    value_model: ScalarModel,
    prompts: Sequence[FittedPrompt[Prompt]],
    accelerator: Accelerator,
    known: Mapping[str, float] | None = None,
    *,
    gather: Gather = nullcontext,
) -> tuple[RolloutWorker, dict[str, float]]:
    """Shift and scale the reward so that samples of the reference policy score 0 on average, with a
    standard deviation of 1 (Ziegler et al. 2019). Then a KL coefficient means the same for every
    reward. With debias_length, the scores also lose what the length explains.

    A reward of several parts gets a scale for each part, measured on the samples that the part
    judges. The weights then count standard deviations.

    The value model gets the shift and scale of the reward that it starts from, so that it stays in
    the units of the scores. A head of zeros is left alone: it predicts 0, which is the mean of the
    new scores.

    Args:
        value_model: its bias and scale are changed in place.
        prompts: prompts to draw reward.normalize_on samples from, in an order set by the seed.
            The order starts again when all were drawn. The number is rounded up to one that all
            processes can share equally.
        known: the scales found when a resumed run began. None: measure them.
        gather: gives this process the whole weights of the value model's head.

    Returns:
        the worker with the normalised reward, and the scales for results.json, each field as
        raw_score_FIELD, with parts as raw_score_PART_FIELD. Where reward.normalize_on is None, the
        same sampler and an empty dict.

    Raises:
        ValueError: all samples have the same score; a part judges no sample; or, with
            debias_length, the two answers to each prompt have the same length.
    """
    settings = worker.config.reward
    if settings.normalize_on is None:
        return worker, {}
    rewards = _rewards_to_scale(settings)
    if known is None:
        scales = _find_scales(worker, rewards, prompts, accelerator)
    else:
        scales = {
            name: ScoreScale(**{field: known[_key(name, field)] for field in _fields(debias)})
            for name, debias in rewards.items()
        }
    start = scales.get(_value_part(settings))
    if start is not None and _is_trained(value_model, gather):
        weight = 1.0 if settings.value_start is None else settings.value_start[1]
        value_model.bias += weight * start.mean / value_model.scale
        value_model.scale /= start.std
    measured = {
        _key(name, field): getattr(scales[name], field)
        for name, debias in rewards.items()
        for field in _fields(debias)
    }
    return replace(worker, reward=_scaled(worker.reward, scales)), measured


def _is_trained(value_model: ScalarModel, gather: Gather) -> bool:
    """Return whether the head is not a new one of zeros."""
    with gather(value_model.head):
        return bool(value_model.head.weight.any())


def _rewards_to_scale(settings: RewardSettings) -> dict[str, bool]:
    """Map each part, or WHOLE, to whether it loses what the length explains."""
    if settings.parts:
        return {name: part.debias_length for name, part in settings.parts.items()}
    return {WHOLE: settings.debias_length}


def _value_part(settings: RewardSettings) -> str:
    """Return the reward that the value model starts from: the first part that is a model."""
    models = (name for name, part in settings.parts.items() if part.model is not None)
    return next(models, WHOLE)


def _key(name: str, field: str) -> str:
    return f"raw_score_{name}_{field}" if name else f"raw_score_{field}"


def _fields(debias: bool) -> tuple[str, ...]:
    """Return which fields of a scale are measured."""
    return ("mean", "std", *(LENGTH_FIELDS if debias else ()))


def _scaled(reward: Reward, scales: Mapping[str, ScoreScale]) -> Reward:
    """Return the reward with these scales in place."""
    if isinstance(reward, WeightedReward):
        parts = reward.parts.items()
        return WeightedReward({name: replace(part, scale=scales[name]) for name, part in parts})
    return NormalizedReward(reward, scales[WHOLE])


def _find_scales(
    worker: RolloutWorker,
    rewards: Mapping[str, bool],
    prompts: Sequence[FittedPrompt[Prompt]],
    accelerator: Accelerator,
) -> dict[str, ScoreScale]:
    """Measure the scale of each reward's raw scores, and print it.

    To take out the length, each prompt is answered twice.
    """
    settings = worker.config.reward
    assert settings.normalize_on is not None
    per_prompt = 2 if settings.takes_length_out else 1
    count = per_prompt * accelerator.num_processes
    num_samples = math.ceil(settings.normalize_on / count) * count
    generator = torch_stream(worker.config.seed, "ppo/normalize/prompts")
    order = torch.randperm(len(prompts), generator=generator)
    chosen = [prompts[i] for i in islice(cycle(order.tolist()), num_samples // per_prompt)]
    own = [prompt for prompt in own_share(accelerator, chosen) for _ in range(per_prompt)]
    samples = _draw(worker, own, accelerator)
    scales = {}
    for name, debias in rewards.items():
        scale, judged = _measure(samples, name, debias, accelerator)
        scales[name] = scale
        accelerator.print(
            f"ppo: {judged} samples of the reference policy score {scale.mean:.4g}"
            f"{_by_part(name)} on average, with a standard deviation of {scale.std:.4g}"
            f"{_length_effect(scale, debias)}; scores are shifted and scaled to 0 and 1"
        )
    return scales


@dataclass(frozen=True)
class _Samples:
    """This process's samples of the reference policy. To take out the length, two in a row answer
    the same prompt."""

    scores: Mapping[str, Tensor]
    """Maps each part, or WHOLE, to raw scores (samples,); nan where a part does not judge."""
    lengths: Tensor
    """(samples,) tokens of each response, including the end token."""


def _draw(
    worker: RolloutWorker, prompts: Sequence[FittedPrompt[Prompt]], accelerator: Accelerator
) -> _Samples:
    """Let the reference policy answer these prompts, and score the answers."""
    generator = torch_stream(worker.config.seed, "ppo/normalize/samples", accelerator.process_index)
    with accelerator.autocast(), raised_in_all_processes():
        with worker.reference_at_hand():
            answers = worker.sample(worker.ref_policy, prompts, generator)
        scored = worker.raw_scores(answers)
        # In a part, nan would look like an answer that the part does not judge.
        found = first_nonfinite(
            {"score": scored.scores}, [one.tree for one in answers], "normalize"
        )
        if found is not None:
            raise found
    parts = scored.parts if worker.config.reward.parts else {WHOLE: scored.scores}
    return _Samples(
        {name: scores.double() for name, scores in parts.items()},
        torch.tensor([float(len(one.response_ids)) for one in answers]).double(),
    )


def _measure(
    samples: _Samples, name: str, debias: bool, accelerator: Accelerator
) -> tuple[ScoreScale, int]:
    """Return the scale of one reward over all processes, and the number of samples it judges.

    The standard deviation is the biased one.
    """
    is_judged = ~samples.scores[name].isnan()
    scores, lengths = samples.scores[name][is_judged], samples.lengths[is_judged]

    def total(values: Tensor) -> float:
        return float(sum_over_processes(accelerator, values.sum()))

    judged = int(total(is_judged.double()))
    if judged == 0:
        raise ValueError(
            f"part {name} judges none of the samples for reward.normalize_on; write the key of its "
            "only_with into meta of the prompts, or raise normalize_on"
        )
    mean = total(scores) / judged
    scale = ScoreScale(mean=mean, std=1.0)
    if debias:
        longer, better = (values[::2] - values[1::2] for values in (lengths, scores))
        unlike = total(longer.square())
        if unlike == 0:
            raise ValueError(
                f"the two answers to each of {judged // 2} prompts have the same length, so "
                f"nothing shows what a token is worth{_by_part(name)}; set debias_length to false, "
                "or raise rollout.max_new_tokens"
            )
        scale = replace(
            scale,
            per_token=total(longer * better) / unlike,
            mean_tokens=total(lengths) / judged,
        )
    std = math.sqrt(total(scale.apply(scores, lengths).square()) / judged)
    if std <= SMALLEST_STD * max(1.0, abs(mean)):
        raise ValueError(
            f"all {judged} samples for reward.normalize_on score {mean:.6g}{_by_part(name)}"
            f"{_length_effect(scale, debias)}, and a standard deviation of 0 cannot be scaled to "
            "1; give a reward that tells responses apart, or reward.normalize_on null"
        )
    return replace(scale, std=std), judged


def _by_part(name: str) -> str:
    return f" by {name}" if name else ""


def _length_effect(scale: ScoreScale, debias: bool) -> str:
    return f" after {scale.per_token:+.3g} a token is taken out" if debias else ""
