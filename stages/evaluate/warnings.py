"""Warn of what an average hides.

A policy may trade one part for another, give one answer to many prompts, please the reward model
alone, or gain by length. Each check compares a policy with the baseline on the same prompts. The
codes are stable. They appear in results.json (`warnings`), at the end of the output and at the top
of samples.md. stages/evaluate/glossary.py describes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlhf.measuring.statistics import (
    Estimate,
    difference_at_equal_length,
    is_one_answer,
    paired_difference,
)
from stages.evaluate.config import GOLD, REWARD_MODEL
from stages.evaluate.glossary import ALARMS
from stages.evaluate.measures import Scores
from stages.evaluate.parts import PartsByPrompt, part_names, part_scores

MIN_PROMPTS = 20
"""Fewest prompts to warn from. With fewer, an interval from resampling them says too little."""
MAX_ONE_ANSWER = 0.1
"""Largest share of different prompts that may get one answer. In many tasks a tenth of the prompts
have the same right answer."""

PARTS = "EVAL_PARTS"
ONE_ANSWER = "EVAL_ONE_ANSWER"
REWARD = "EVAL_REWARD"
LENGTH = "EVAL_LENGTH"
REMEDIES = {alarm.code: alarm.remedy for alarm in ALARMS}


@dataclass(frozen=True)
class EvaluationWarning:
    """Describes a policy's fault in words."""

    code: str
    policy: str
    message: str


class Frequent(NamedTuple):
    """Holds the answer that the most prompts get."""

    text: str
    share: float
    """Share of the different prompts that get it."""


def find_warnings(
    policies: Sequence[str],
    baseline: str,
    *,
    scores: Mapping[str, Mapping[str, Scores]],
    lengths: Mapping[str, Scores],
    parts: Mapping[str, PartsByPrompt],
    right_part: str | None,
    frequent: Mapping[str, Frequent],
    num_prompts: int,
    seed: int,
) -> list[EvaluationWarning]:
    """Return all warnings about these policies, in the order of the policies.

    Args:
        scores: maps judge to policy to scores.
        lengths: maps policy to the tokens of each prompt's responses.
        parts: maps policy to parts of gold; empty if gold gives none.
        right_part: The part of gold that says whether a response is right. It counts as a judge of
            its own, since gold as a whole may rise through manners alone.
        frequent: maps policy to its most frequent answer.
        num_prompts: Number of different prompts.
    """
    names = part_names(parts[baseline]) if parts else []
    of_gold = {
        name: {policy: part_scores(of, name) for policy, of in parts.items()} for name in names
    }
    of_judges = {name: of for name, of in scores.items() if name != GOLD}
    reward = scores.get(REWARD_MODEL)
    independent = {name: of for name, of in scores.items() if name != REWARD_MODEL}
    if right_part in of_gold:
        independent[f"gold's part {right_part}"] = of_gold[right_part]
    warnings = []
    for policy in policies:
        warnings += find_parts_traded(policy, baseline, of_gold, seed)
        warnings += find_parts_traded(
            policy, baseline, of_judges, seed, not_gains=[REWARD_MODEL]
        )  # find_reward_disagreement covers gains by the reward model alone
        warnings += find_one_answer(policy, baseline, frequent, num_prompts)
        if reward is not None:
            warnings += find_reward_disagreement(policy, baseline, reward, independent, seed)
        warnings += find_gain_by_length(policy, baseline, scores, lengths, seed)
    return warnings


def find_parts_traded(
    policy: str,
    baseline: str,
    parts: Mapping[str, Mapping[str, Scores]],
    seed: int,
    *,
    not_gains: Sequence[str] = (),
) -> list[EvaluationWarning]:
    """Warn if the policy gains by one part and loses by another, each beyond its 95 % interval.

    Args:
        parts: maps part to policy to values of each prompt's responses.
        not_gains: Parts whose gain alone is no reason to warn.
    """
    changes = {name: _change(policy, baseline, of, seed) for name, of in parts.items()}
    gains = {name: one for name, one in changes.items() if one is not None and one.interval[0] > 0}
    losses = {name: one for name, one in changes.items() if one is not None and one.interval[1] < 0}
    if not losses or not set(gains) - set(not_gains):
        return []
    message = (
        f"{policy} gains by {_list(gains)} and loses by {_list(losses)} against {baseline}. "
        f"{REMEDIES[PARTS]}"
    )
    return [EvaluationWarning(PARTS, policy, message)]


def find_one_answer(
    policy: str, baseline: str, frequent: Mapping[str, Frequent], num_prompts: int
) -> list[EvaluationWarning]:
    """Warn if the policy gives one answer to many prompts, and the baseline does not."""
    now, before = frequent[policy], frequent[baseline]
    if num_prompts < MIN_PROMPTS or not is_one_answer(now.share, before.share, MAX_ONE_ANSWER):
        return []
    message = (
        f"{policy} gives one answer to {now.share:.0%} of {num_prompts} different prompts: "
        f"{_shorten(now.text)!r}. The most frequent answer of {baseline} goes to "
        f"{before.share:.0%}. {REMEDIES[ONE_ANSWER]}"
    )
    return [EvaluationWarning(ONE_ANSWER, policy, message)]


def find_reward_disagreement(
    policy: str,
    baseline: str,
    reward: Mapping[str, Scores],
    judges: Mapping[str, Mapping[str, Scores]],
    seed: int,
) -> list[EvaluationWarning]:
    """Warn if the reward rises and the score of an independent judge does not.

    Args:
        reward: maps policy to the reward model's scores of each prompt's responses.
        judges: maps judge to policy to that judge's scores.
    """
    rise = _change(policy, baseline, reward, seed)
    if rise is None or not rise.interval[0] > 0:
        return []
    warnings = []
    for name, of in judges.items():
        change = _change(policy, baseline, of, seed)
        if change is None or change.interval[0] > 0:
            continue
        verb = "falls" if change.interval[1] < 0 else "does not rise beyond its interval"
        message = (
            f"The reward of {policy} rises by {_signed(rise)} against {baseline}, and {name} "
            f"{verb} ({_signed(change)}): the policy may learn to please the reward model "
            f"alone. {REMEDIES[REWARD]}"
        )
        warnings.append(EvaluationWarning(REWARD, policy, message))
    return warnings


def find_gain_by_length(
    policy: str,
    baseline: str,
    judges: Mapping[str, Mapping[str, Scores]],
    lengths: Mapping[str, Scores],
    seed: int,
) -> list[EvaluationWarning]:
    """Warn if the policy gains by a judge, but not at equal length with the baseline.

    Args:
        judges: maps judge to policy to that judge's scores of each prompt's responses.
        lengths: maps policy to the tokens of the same responses.
    """
    found = []
    for name, of in judges.items():
        change = _change(policy, baseline, of, seed)
        if change is None or not change.interval[0] > 0:
            continue
        at_equal_length = difference_at_equal_length(
            of[policy], of[baseline], lengths[policy], lengths[baseline], seed
        )
        if not at_equal_length.interval[0] > 0:
            found.append(f"{_signed(at_equal_length)} by {name} ({_signed(change)} as they are)")
    if not found:
        return []
    longer = paired_difference(lengths[policy], lengths[baseline], seed).value
    message = (
        f"At equal length {policy} gains {'; '.join(found)}. Its responses have {abs(longer):.1f} "
        f"tokens {'more' if longer > 0 else 'less'} than those of {baseline}: the gain may be "
        f"length alone. {REMEDIES[LENGTH]}"
    )
    return [EvaluationWarning(LENGTH, policy, message)]


def _change(policy: str, baseline: str, scores: Mapping[str, Scores], seed: int) -> Estimate | None:
    """Estimate policy minus baseline, paired by prompt; None if too few prompts have both."""
    both = zip(scores[policy], scores[baseline], strict=True)
    if sum(bool(a and b) for a, b in both) < MIN_PROMPTS:
        return None
    return paired_difference(scores[policy], scores[baseline], seed)


def _list(changes: Mapping[str, Estimate]) -> str:
    return ", ".join(f"{name} ({_signed(change)})" for name, change in changes.items())


def _signed(change: Estimate) -> str:
    low, high = change.interval
    return f"{change.value:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}"


def _shorten(text: str, most: int = 80) -> str:
    return text if len(text) <= most else f"{text[:most]}..."
