"""Say in words how a run ended: first whether responses are right, then what the judges prefer.

A policy is judged by outcome. If gold says which responses are right, their share decides. If not,
an independent judge decides. The reward model never does: the policy was trained to please it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tools.report.figures import Sentence, SentencePart, Source
from tools.report.folders import RunFolder, Stage
from tools.report.panels import RaisedAlarm

Tone = Literal["good", "bad", "mixed", "unclear"]

REWARD_MODEL = "rm"
NAMES = {"gold": "gold", REWARD_MODEL: "the reward model"}
"""Maps the names of judges in results.json to what a sentence calls them."""
LONGER = 1.25
"""Factor between mean lengths from which the page mentions them."""
HUMAN_AGREEMENT = "InstructGPT's labelers agreed on 72.6 % of pairs (Ouyang et al. 2022, 3.4)"


@dataclass(frozen=True)
class Verdict:
    """The outcome of a run, in sentences."""

    headline: Sentence
    tone: Tone
    points: list[Sentence] = field(default_factory=list)
    """What speaks for it and against it, the most important first."""
    warnings: list[tuple[str, Sentence]] = field(default_factory=list)
    """Warnings and alarms, each with its code."""


def verdict_of(run: RunFolder, alarms: Sequence[RaisedAlarm]) -> Verdict:
    """Judge a run: its last policy if it was evaluated, otherwise what its stages reached."""
    own = [alarm for alarm in alarms if alarm.run == run.number]
    warnings = [*_evaluation_warnings(run), *map(_alarm_sentence, own)]
    broken = [one for one in run.stages if not one.is_finished]
    evaluation = run.evaluation
    if evaluation is not None and evaluation.results is not None and not broken:
        return _of_evaluation(evaluation.results, warnings)
    if broken:
        return _of_unfinished(run, broken, own, warnings)
    stages = [one for one in run.stages if not one.stage.startswith("data")] or run.stages
    points = [sentence for stage in stages for sentence in summary(stage)]
    if len(stages) > 1:
        return Verdict(["The stages are done; nothing was evaluated yet."], "unclear", points)
    headline, *rest = points or [[f"{stages[0].name} is finished."]]
    return Verdict(headline, "unclear", rest, warnings)


def _of_evaluation(results: Source, warnings: list[tuple[str, Sentence]]) -> Verdict:
    policies: list[str] = results.get("policies")
    baseline: str = results.get("baseline")
    after = policies[policies.index(baseline) + 1 :]
    if not after:
        return Verdict(
            [f"{policies[-1]} was measured, and no policy comes after the baseline {baseline}."],
            "unclear",
            list(_costs(results, policies[-1], baseline)),
            warnings,
        )
    main = after[-1]
    headline, change = _substance(results, main, baseline)
    costs = list(_costs(results, main, baseline))
    points = [*_paired_gain(results, main, baseline), *_wins(results, main, baseline), *costs]
    for other in reversed(after[:-1]):
        points.append(_substance(results, other, baseline)[0])
    points += _best_of(results, baseline)
    tone: Tone = "unclear"
    if change == -1:
        tone = "bad"
    elif change == 1:
        tone = "mixed" if warnings else "good"
    return Verdict(headline, tone, points, warnings)


def _substance(results: Source, policy: str, baseline: str) -> tuple[Sentence, int | None]:
    """Say what changed in substance; also -1, 0 or 1, or None if no independent judge was asked."""
    right, before = (results.figure(name, "right", is_percent=True) for name in (policy, baseline))
    if right is not None and before is not None:
        change = _sign(results.get(policy, f"right_gain_vs_{baseline}_interval"))
        if change is None:  # an older run, which did not pair the prompts
            change = _apart(
                results.get(policy, "right_interval"), results.get(baseline, "right_interval")
            )
        how = {1: "more often right than", -1: "less often right than"}.get(
            change or 0, "about as often right as"
        )
        return [
            f"{policy} is {how} {baseline}: ",
            right,
            " of its responses against ",
            before,
            ".",
        ], change
    judges = [name for name in results.get("judges") or [] if name != REWARD_MODEL]
    for judge in judges:
        key = _win_rate(results, judge, baseline)
        rate = results.figure(policy, key, is_percent=True)
        ends = results.interval(policy, f"{key}_interval", is_percent=True)
        if rate is not None and ends is not None:
            change = 1 if ends.low.value > 0.5 else -1 if ends.high.value < 0.5 else 0
            how = {1: "better than", -1: "worse than", 0: "not clearly different from"}[change]
            return [
                f"{policy} is {how} {baseline} by {_name(judge)}: it wins ",
                rate,
                " (",
                ends,
                ").",
            ], change
    return [
        f"Whether {policy} is better than {baseline} is open: no independent judge was asked, "
        "only the reward model that it was trained to please.",
    ], None


def _paired_gain(results: Source, policy: str, baseline: str) -> Iterator[Sentence]:
    gain = results.figure(policy, f"right_gain_vs_{baseline}")
    ends = results.interval(policy, f"right_gain_vs_{baseline}_interval")
    if gain is not None and ends is not None:
        yield ["Share of right responses, paired by prompt: a gain of ", gain, " (", ends, ")."]


def _wins(results: Source, policy: str, baseline: str) -> Iterator[Sentence]:
    for judge in results.get("judges") or []:
        key = _win_rate(results, judge, baseline)
        rate = results.figure(policy, key, is_percent=True)
        ends = results.interval(policy, f"{key}_interval", is_percent=True)
        if rate is not None:
            interval: list[SentencePart] = [] if ends is None else [" (", ends, ")"]
            gain = _gain_at_equal_length(results, judge, policy, baseline)
            yield [f"Win rate against {baseline} by {_name(judge)}: ", rate, *interval, ".", *gain]


def _gain_at_equal_length(
    results: Source, judge: str, policy: str, baseline: str
) -> Iterator[SentencePart]:
    """Say what a judge's score gains, and what is left where responses are equally long."""
    key = f"{judge}_gain_at_equal_length_vs_{baseline}"
    gain = results.figure(policy, f"{judge}_gain_vs_{baseline}")
    left, ends = results.figure(policy, key), results.interval(policy, f"{key}_interval")
    if gain is not None and left is not None:
        interval: list[SentencePart] = [] if ends is None else [" (", ends, ")"]
        words: list[SentencePart] = [" The gain in score is ", gain, ", and at equal length ", left]
        yield from [*words, *interval, "."]


def _costs(results: Source, policy: str, baseline: str) -> Iterator[Sentence]:
    """Say what the training cost: greedy answers, plain text, facts, length, KL."""
    pairs = (
        ("right_greedy", True, "Greedy responses that are right: "),
        ("text_loss", False, "Loss on held-out text, nats a token: "),
        ("fact_recall", True, "Recall of facts from pretraining: "),
    )
    for key, is_percent, words in pairs:
        now, before = (
            results.figure(name, key, is_percent=is_percent) for name in (policy, baseline)
        )
        if now is not None and before is not None and policy != baseline:
            yield [words, now, f" ({policy}) after ", before, f" ({baseline})."]
    tokens, first = (
        results.figure(name, "response_tokens", digits=1) for name in (policy, baseline)
    )
    if tokens is not None and first is not None and first.value > 0:
        factor = tokens.value / first.value
        if not 1 / LONGER < factor < LONGER:
            how = "longer" if factor > 1 else "shorter"
            yield [f"Its responses are {how}: ", tokens, " tokens after ", first, "."]
    kl, error = results.figure(policy, "kl", digits=2), results.figure(policy, "kl_error", digits=2)
    if kl is not None:
        spread: list[SentencePart] = [] if error is None else [" (standard error ", error, ")"]
        yield [f"Its KL to {baseline} is ", kl, " nats a response", *spread, "."]


def _best_of(results: Source, baseline: str) -> Iterator[Sentence]:
    name = results.get("best_of", "name")
    if name is None:
        return
    kl = results.figure(name, "kl", digits=2)
    right = results.figure(name, "right", is_percent=True)
    judge = results.get("best_of", "judge")
    words: list[SentencePart] = [
        f"Without any training, the best of {results.get('best_of', 'n')} responses of {baseline} "
        f"by {_name(judge)}",
    ]
    words += [] if right is None else [" is right in ", right]
    words += [] if kl is None else [", at a KL of at most ", kl, " nats"]
    yield [*words, "."]


def _of_unfinished(
    run: RunFolder,
    broken: list[Stage],
    alarms: list[RaisedAlarm],
    warnings: list[tuple[str, Sentence]],
) -> Verdict:
    stage = broken[0]
    stops = [alarm for alarm in alarms if alarm.has_stopped and alarm.stage is stage]
    where = _progress(stage)
    if stage.nonfinite is not None or stops:
        code = stops[-1].code if stops else "PPO_NONFINITE"
        step = f" at update {stops[-1].steps[-1]}" if stops and stops[-1].steps else ""
        headline: Sentence = [f"{stage.name} was stopped by {code}{step}. {where}"]
        return Verdict(headline, "bad", [*_nonfinite(stage), *summary(stage)], warnings)
    if stage.is_running:
        state = f"{stage.name} is at work."
    else:
        state = f"{stage.name} is not finished, and no process is at work in it."
    done = [one for one in run.stages if one.results is not None]
    points = [sentence for one in done for sentence in summary(one)]
    return Verdict([f"{state} {where}"], "unclear", points, warnings)


def _progress(stage: Stage) -> str:
    if stage.last_step is None:
        return "It has logged nothing yet."
    whole = "" if stage.num_steps is None else f" of {stage.num_steps}, counted from 0"
    unit = "update" if stage.stage == "ppo" else "step"
    return f"The last {unit} that it logged is {stage.last_step}{whole}."


def _nonfinite(stage: Stage) -> Iterator[Sentence]:
    if stage.nonfinite is not None:
        found = stage.nonfinite
        yield [
            f"{found.get('tensor')} was not finite in phase {found.get('phase')} of update "
            f"{found.get('update')}; nonfinite.json has the row."
        ]


def summary(stage: Stage) -> Iterator[Sentence]:
    """Say in a sentence or two what a finished stage reached."""
    results = stage.results
    if results is None:
        return
    if stage.stage == "rm":
        yield from _about_reward_model(results)
    elif stage.stage == "collect":
        yield from _about_labels(results)
    elif stage.stage == "ppo":
        yield from _about_ppo(stage.name, results)
    elif stage.stage == "sft":
        now, before = results.figure("held_out_loss"), results.figure("base_held_out_loss")
        if now is not None and before is not None:
            yield [
                "SFT: loss on held-out demonstrations ",
                now,
                " nats a token, from ",
                before,
                ".",
            ]
    elif stage.stage == "pretrain":
        loss, recall = (
            results.figure("held_out_loss"),
            results.figure("fact_recall", is_percent=True),
        )
        if loss is not None:
            words: list[SentencePart] = [] if recall is None else [", fact recall ", recall]
            yield ["Pretraining: loss on held-out text ", loss, " nats a token", *words, "."]


def _about_reward_model(results: Source) -> Iterator[Sentence]:
    accuracy = results.figure("pair_accuracy", is_percent=True)
    ends = results.interval("pair_accuracy_interval", is_percent=True)
    length = results.figure("length_baseline", is_percent=True)
    if accuracy is None:
        return
    interval: list[SentencePart] = [] if ends is None else [" (", ends, ")"]
    yield ["The reward model orders ", accuracy, *interval, " of held-out pairs as labelers do."]
    if length is not None and ends is not None:
        low = ends.low.value
        how = "clearly above" if low > length.value else "not clearly above"
        direction = results.get("length_direction")
        yield [
            f"That is {how} the length baseline ({direction}), which gets ",
            length,
            ".",
        ]


def _about_labels(results: Source) -> Iterator[Sentence]:
    share = results.figure("agreement", is_percent=True)
    ends = results.interval("agreement_interval", is_percent=True)
    if share is not None:
        interval: list[SentencePart] = [] if ends is None else [" (", ends, ")"]
        yield ["Two labelers agree on ", share, *interval, f" of pairs; {HUMAN_AGREEMENT}."]


def _about_ppo(name: str, results: Source) -> Iterator[Sentence]:
    score, kl = results.figure("held_out_score"), results.figure("held_out_kl", digits=2)
    which = " on held-out prompts"
    if score is None or kl is None:
        score, kl, which = results.figure("score"), results.figure("kl", digits=2), ""
    if score is not None and kl is not None:
        yield [f"{name}: the mean score ended at ", score, f"{which}, at a KL of ", kl, " nats."]


def _evaluation_warnings(run: RunFolder) -> Iterator[tuple[str, Sentence]]:
    evaluation = run.evaluation
    if evaluation is not None and evaluation.results is not None:
        for warning in evaluation.results.get("warnings") or []:
            yield str(warning.get("code")), [str(warning.get("message"))]


def _alarm_sentence(alarm: RaisedAlarm) -> tuple[str, Sentence]:
    when = ""
    if alarm.steps:
        first, last = alarm.steps[0], alarm.steps[-1]
        when = f"update {first}" if first == last else f"{len(alarm.steps)} updates from {first} on"
    ended = " This ended the run." if alarm.has_stopped else ""
    return alarm.code, [f"{alarm.stage.name}, {when}: {alarm.message}{ended}"]


def _name(judge: str) -> str:
    return NAMES.get(judge, judge)


def _win_rate(results: Source, judge: str, baseline: str) -> str:
    """Return the key of the win rate by this judge; the first judge's has no name in it."""
    is_main = results.get("judge") == judge
    return f"win_rate_vs_{baseline}" + ("" if is_main else f"_by_{judge}")


def _sign(interval: object) -> int | None:
    """Return 1 or -1 for an interval above or below 0, 0 if it includes 0, None if unknown."""
    if not isinstance(interval, list) or not all(isinstance(end, int | float) for end in interval):
        return None
    low, high = interval
    return 1 if low > 0 else -1 if high < 0 else 0


def _apart(own: object, other: object) -> int | None:
    """Compare two intervals: 1 or -1 if they do not overlap, otherwise 0."""
    if not isinstance(own, list) or not isinstance(other, list):
        return None
    return 1 if own[0] > other[1] else -1 if own[1] < other[0] else 0
