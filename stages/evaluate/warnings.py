"""What an average hides, told in words: parts traded, one answer to everything, a reward that lies.

Each check compares a policy with the baseline on the same prompts. The codes are stable; they stand
in results.json (`warnings`), at the end of the output and at the top of samples.md.
docs/metrics.md lists them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlhf.measuring.statistics import Estimate, is_one_answer, paired_difference
from stages.evaluate.config import GOLD, REWARD_MODEL
from stages.evaluate.measures import Scores
from stages.evaluate.parts import PartsByPrompt, part_names, part_scores

MIN_PROMPTS = 20
"""With fewer prompts an interval from resampling them tells too little to warn of anything."""
MAX_ONE_ANSWER = 0.1
"""Share of different prompts that one answer may go to. A task with a class of a tenth of its
prompts and one right answer for it is not rare."""

PARTS = "EVAL_PARTS"
ONE_ANSWER = "EVAL_ONE_ANSWER"
REWARD = "EVAL_REWARD"


@dataclass(frozen=True)
class EvaluationWarning:
    """A policy's fault in words."""

    code: str
    policy: str
    message: str


class Frequent(NamedTuple):
    """The answer that the most prompts get."""

    text: str
    share: float
    """Of different prompts."""


def find_warnings(
    policies: Sequence[str],
    baseline: str,
    *,
    scores: Mapping[str, Mapping[str, Scores]],
    parts: Mapping[str, PartsByPrompt],
    right_part: str | None,
    frequent: Mapping[str, Frequent],
    num_prompts: int,
    seed: int,
) -> list[EvaluationWarning]:
    """All warnings about these policies, in the order of the policies.

    Args:
        scores: judge -> policy -> scores.
        parts: policy -> parts of gold; empty where gold gives none.
        right_part: The part of gold that says whether a response is right. It is a judge of its
            own, since gold as a whole may rise by manners alone.
        frequent: policy -> its most frequent answer.
        num_prompts: Different prompts.
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
        )  # gains by the reward model alone are what the last check is for
        warnings += find_one_answer(policy, baseline, frequent, num_prompts)
        if reward is not None:
            warnings += find_reward_parted(policy, baseline, reward, independent, seed)
    return warnings


def find_parts_traded(
    policy: str,
    baseline: str,
    parts: Mapping[str, Mapping[str, Scores]],
    seed: int,
    *,
    not_gains: Sequence[str] = (),
) -> list[EvaluationWarning]:
    """The policy gains by one part and loses by another, each beyond its 95 % interval.

    Args:
        parts: part -> policy -> values of each prompt's responses.
        not_gains: Parts by which a gain alone is no reason to warn.
    """
    changes = {name: _change(policy, baseline, of, seed) for name, of in parts.items()}
    gains = {name: one for name, one in changes.items() if one is not None and one.interval[0] > 0}
    losses = {name: one for name, one in changes.items() if one is not None and one.interval[1] < 0}
    if not losses or not set(gains) - set(not_gains):
        return []
    message = (
        f"{policy} gains by {_list(gains)} and loses by {_list(losses)} against {baseline}. "
        "Look at the parts one by one: their sum hides the loss."
    )
    return [EvaluationWarning(PARTS, policy, message)]


def find_one_answer(
    policy: str, baseline: str, frequent: Mapping[str, Frequent], num_prompts: int
) -> list[EvaluationWarning]:
    """The policy gives one answer to many prompts, and the baseline did not."""
    now, before = frequent[policy], frequent[baseline]
    if num_prompts < MIN_PROMPTS or not is_one_answer(now.share, before.share, MAX_ONE_ANSWER):
        return []
    message = (
        f"{policy} gives one answer to {now.share:.0%} of {num_prompts} different prompts: "
        f"{_shorten(now.text)!r}. The most frequent answer of {baseline} goes to "
        f"{before.share:.0%}. Read samples.md, raise ppo.kl_coef, and train the reward model on "
        "such answers too."
    )
    return [EvaluationWarning(ONE_ANSWER, policy, message)]


def find_reward_parted(
    policy: str,
    baseline: str,
    reward: Mapping[str, Scores],
    judges: Mapping[str, Mapping[str, Scores]],
    seed: int,
) -> list[EvaluationWarning]:
    """The reward rises, and a judge that is independent of it does not.

    Args:
        reward: policy -> scores of each prompt's responses by the reward model.
        judges: judge -> the same by that judge.
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
            "alone. Train the reward model on this policy's answers, raise ppo.kl_coef, or stop "
            "earlier."
        )
        warnings.append(EvaluationWarning(REWARD, policy, message))
    return warnings


def _change(policy: str, baseline: str, scores: Mapping[str, Scores], seed: int) -> Estimate | None:
    """Policy less baseline, paired over prompts; None where too few prompts have both."""
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
