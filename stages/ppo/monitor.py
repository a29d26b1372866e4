"""Raise alarms for what can go wrong in PPO, each with a code, what was found, and a remedy.

After each rollout and after each update the monitor looks at the metrics so far. A rule that finds
a fault prints a warning of two sentences. If its code is in `monitor.stop_on`, the run stops. The
codes are stable: scripts may look for them in the output, in metrics.jsonl (`ppo/alarms` counts
them) and in results.json (`alarms`). stages/ppo/glossary.py describes them.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rlhf.inputs.chat import Chat
from rlhf.measuring.statistics import is_one_answer
from rlhf.training.nonfinite import NonFiniteError
from stages.ppo.config import Config, MonitorSettings
from stages.ppo.glossary import ALARMS

Metrics = Mapping[str, float]
FaultFinder = Callable[[Metrics, "Monitor"], str | None]
"""Takes the metrics of this update so far and the monitor, which holds the earlier updates; returns
what is wrong, or None."""

NONFINITE = "PPO_NONFINITE"
RM_CHANCE = "PPO_RM_CHANCE"
REPLAY_FILE = "nonfinite.json"
LAST_GOOD = "last_good"
POLICIES = "policies"


@dataclass(frozen=True)
class Noise:
    """Holds limits on how far rounding alone sets two log-probabilities of a token apart."""

    mean: float
    """Mean over tokens, in nats."""
    high: float
    """Nats that one token in a thousand may exceed. A maximum says little, since it grows with the
    number of tokens."""


TOKEN_NOISE = {"float32": Noise(1e-4, 1e-3), "bfloat16": Noise(0.1, 0.5)}
"""Noise between two passes of one model, by its dtype."""
SAMPLER_NOISE = 2.0
"""Multiple of TOKEN_NOISE allowed between the sampler, which decodes token by token with a cache,
and one packed pass. SmolLM2-135M in bfloat16 reaches 0.03 to 0.05 nats in the mean over tokens, and
0.28 nats on one of 3,000."""
ENGINE_NOISE = {"hf": Noise(0.0, 0.0), "vllm": Noise(0.1, 0.5)}
"""Noise that the kernels of an engine add. hf adds none, since it runs the trainer's own model."""
NUM_ERRORS = 4.0
"""A mean KL this many standard errors below 0 is not negative by chance."""
SAMPLER_ERRORS = 6.0
"""A mean log-probability of sampled tokens this many standard errors from its expectation is not
chance."""
SAMPLER_EXCESS = 0.02
"""Nats a token that this difference must also reach, since rounding can cause smaller ones."""
ONE_ANSWER_UPDATES = 4
"""Updates over which the share of the most frequent response is averaged. In a single rollout of
some hundred prompts a large share may be chance."""
HISTORY = 10
"""Number of earlier updates that a value loss is compared with."""


def sampler_noise(config: Config, token_noise: Noise) -> Noise:
    """Return the noise between sampler and trainer in the run's dtype."""
    added = ENGINE_NOISE[config.generation.engine]
    return Noise(
        SAMPLER_NOISE * token_noise.mean + added.mean, SAMPLER_NOISE * token_noise.high + added.high
    )


def above_noise(metrics: Metrics, name: str, noise: Noise) -> str | None:
    """Describe the differences of this name if they exceed the noise or are NaN; else None."""
    mean, high = metrics[name], metrics[f"{name}_high"]
    if mean <= noise.mean and high <= noise.high:
        return None
    return (
        f"by {mean:.2g} nats in the mean over tokens, and by over {high:.2g} nats on one in a "
        f"thousand, where noise stays below {noise.mean:g} and {noise.high:g}."
    )


class TrainingStopped(ValueError):
    """Raised when an alarm ends the run."""


@dataclass(frozen=True)
class Rule:
    """Finds a fault; stages/ppo/glossary.py says what its code means and what to do about it."""

    code: str
    needs: tuple[str, ...]
    """Metrics that the rule reads. It is tried once an update, as soon as all of them are there."""
    find: FaultFinder


def reference_differs(metrics: Metrics, monitor: "Monitor") -> str | None:
    apart = above_noise(metrics, "ppo/reference_difference", monitor.token_noise)
    if monitor.history or apart is None:
        return None
    return f"Before the first update the policy differs from its reference {apart}"


def sampler_differs(metrics: Metrics, monitor: "Monitor") -> str | None:
    """Check the log-probabilities that the sampler reports, then the tokens that it draws.

    A sampler may draw from another distribution than the one it reports. Only the mean over many
    tokens shows that.
    """
    noise = sampler_noise(monitor.config, monitor.token_noise)
    apart = above_noise(metrics, "ppo/sampler_difference", noise)
    if apart is not None:
        return f"Sampler and trainer differ on the log-probabilities of sampled tokens {apart}"
    rows = [row for row in [*monitor.history, metrics] if "ppo/sampler_z" in row]
    errors = sum(row["ppo/sampler_z"] for row in rows) / math.sqrt(len(rows))
    excess = sum(row["ppo/sampler_excess"] for row in rows) / len(rows)
    if abs(errors) < SAMPLER_ERRORS or abs(excess) < SAMPLER_EXCESS:
        return None
    likely = "less likely" if excess > 0 else "likelier"
    return (
        f"Sampled tokens are {abs(excess):.3f} nats {likely} than the policy's own distribution "
        f"makes them, {abs(errors):.0f} standard errors: the sampler draws from another one than "
        "the scorer computes."
    )


def kl_is_negative(metrics: Metrics, monitor: "Monitor") -> str | None:
    kl, error = metrics["ppo/kl"], metrics["ppo/kl_error"]
    # While policy and reference are equal the error is near 0 too, and rounding can pass the test
    # below. Such a KL is never as far below 0 as -0.05.
    if kl > -0.05 or not kl < -NUM_ERRORS * error:
        return None
    return (
        f"The KL to the reference is {kl:.2f} nats a response (standard error {error:.2f}), and a "
        "true one is never negative."
    )


def kl_is_large(metrics: Metrics, monitor: "Monitor") -> str | None:
    kl, most = metrics["ppo/kl"], monitor.limits.max_kl
    if kl <= most:
        return None
    return f"The KL to the reference is {kl:.1f} nats a response, over monitor.max_kl {most:g}."


def few_ends(metrics: Metrics, monitor: "Monitor") -> str | None:
    rate, least = metrics["ppo/eos_rate"], monitor.limits.min_eos_rate
    most = monitor.config.rollout.max_new_tokens
    if rate >= least:
        return None
    return (
        f"Only {rate:.0%} of the responses end by themselves within {most} tokens, under "
        f"monitor.min_eos_rate {least:g}."
    )


def length_collapses(metrics: Metrics, monitor: "Monitor") -> str | None:
    if not monitor.history:
        return None
    first, tokens = monitor.history[0]["ppo/response_tokens"], metrics["ppo/response_tokens"]
    factor = monitor.limits.max_length_change
    if first / factor <= tokens <= first * factor:
        return None
    return (
        f"Responses have {tokens:.1f} tokens, and had {first:.1f} in the first update: a change by "
        f"more than monitor.max_length_change {factor:g}."
    )


def responses_repeat(metrics: Metrics, monitor: "Monitor") -> str | None:
    if not monitor.history:
        return None
    first, share = monitor.history[0]["ppo/distinct_2"], metrics["ppo/distinct_2"]
    least = monitor.limits.min_distinct * first
    if share >= least:
        return None
    return (
        f"Only {share:.1%} of the bigrams in the responses are different ones, and {first:.1%} were"
        " in the first update: the policy repeats itself."
    )


def one_answer_to_many(metrics: Metrics, monitor: "Monitor") -> str | None:
    if not monitor.history:
        return None
    first = monitor.history[0]["ppo/one_answer"]
    recent = [*monitor.history[1 - ONE_ANSWER_UPDATES :], metrics]
    share = sum(row["ppo/one_answer"] for row in recent) / len(recent)
    most = monitor.limits.max_one_answer
    if not is_one_answer(share, first, most):
        return None
    return (
        f"One and the same response goes to {share:.1%} of the different prompts, mean of "
        f"{len(recent)} updates, over monitor.max_one_answer {most:g}, and in the first update to "
        f"{first:.1%}: the policy answers without regard to what is asked."
    )


def advantages_vanish(metrics: Metrics, monitor: "Monitor") -> str | None:
    score, spread = metrics["ppo/score"], metrics["ppo/score_std"]
    # A float32 holds about seven digits, so spreads below 1e-6 are rounding.
    if metrics["ppo/advantage_std"] < 1e-6:
        return "All advantages of the update are equal, so it teaches the policy nothing."
    if spread > 1e-6 * max(1.0, abs(score)):
        return None
    return (
        f"All responses of the update have the same score, {score:.3g}, so the advantages hold "
        "nothing but the KL penalty and the errors of the value model."
    )


def ratio_is_not_one(metrics: Metrics, monitor: "Monitor") -> str | None:
    noise = monitor.token_noise
    if "ppo/sampler_difference" not in metrics:  # the sampler computed the old probabilities
        noise = sampler_noise(monitor.config, noise)
    apart = above_noise(metrics, "ppo/first_log_ratio", noise)
    # For a NaN the step raises PPO_NONFINITE, which names the tensor and the prompt.
    if apart is None or math.isnan(metrics["ppo/first_log_ratio"]):
        return None
    return f"In the first step on a rollout the new probabilities differ from the old ones {apart}"


def many_clipped(metrics: Metrics, monitor: "Monitor") -> str | None:
    share, most = metrics["ppo/clip_fraction"], monitor.limits.max_clip_fraction
    if share <= most:
        return None
    return f"{share:.0%} of the tokens are clipped, over monitor.max_clip_fraction {most:g}."


def steps_are_long(metrics: Metrics, monitor: "Monitor") -> str | None:
    kl, most = metrics["ppo/approx_kl"], monitor.limits.max_update_kl
    if kl <= most:
        return None
    return (
        f"Within one update the policy moves {kl:.3f} nats a token from the one that sampled, over "
        f"monitor.max_update_kl {most:g}."
    )


def value_loss_explodes(metrics: Metrics, monitor: "Monitor") -> str | None:
    losses = [row["ppo/value_loss"] for row in monitor.history[-HISTORY:]]
    factor = monitor.limits.max_value_loss_growth
    # The median of fewer than three losses is too uncertain to compare with.
    if len(losses) < 3 or metrics["ppo/value_loss"] <= factor * median(losses):
        return None
    return (
        f"The value loss is {metrics['ppo/value_loss']:.3g}, {factor:g} times and more of the "
        f"{median(losses):.3g} that is the median of the {len(losses)} updates before."
    )


def value_clip_is_tight(metrics: Metrics, monitor: "Monitor") -> str | None:
    clip_range, error = monitor.config.ppo.value_clip_range, metrics["ppo/value_error"]
    if clip_range is None or error <= monitor.limits.max_value_error * clip_range:
        return None
    return (
        f"The value model is {error:.3g} off (root mean square, in units of the score), and "
        f"ppo.value_clip_range {clip_range:g} lets it move by no more than that an update."
    )


RULES = (
    Rule(
        "PPO_REFERENCE",
        ("ppo/reference_difference", "ppo/reference_difference_high"),
        reference_differs,
    ),
    Rule(
        "PPO_SAMPLER",
        (
            "ppo/sampler_difference",
            "ppo/sampler_difference_high",
            "ppo/sampler_z",
            "ppo/sampler_excess",
        ),
        sampler_differs,
    ),
    Rule("PPO_NEG_KL", ("ppo/kl", "ppo/kl_error"), kl_is_negative),
    Rule("PPO_KL", ("ppo/kl",), kl_is_large),
    Rule("PPO_NO_EOS", ("ppo/eos_rate",), few_ends),
    Rule("PPO_LENGTH", ("ppo/response_tokens",), length_collapses),
    Rule("PPO_REPEAT", ("ppo/distinct_2",), responses_repeat),
    Rule("PPO_ONE_ANSWER", ("ppo/one_answer",), one_answer_to_many),
    Rule("PPO_ZERO_ADV", ("ppo/score", "ppo/score_std", "ppo/advantage_std"), advantages_vanish),
    Rule("PPO_RATIO", ("ppo/first_log_ratio", "ppo/first_log_ratio_high"), ratio_is_not_one),
    Rule("PPO_CLIP", ("ppo/clip_fraction",), many_clipped),
    Rule("PPO_UPDATE_KL", ("ppo/approx_kl",), steps_are_long),
    Rule("PPO_VALUE", ("ppo/value_loss",), value_loss_explodes),
    Rule("PPO_VALUE_CLIP", ("ppo/value_error",), value_clip_is_tight),
)
"""All rules, sorted so that a cause comes before its effects."""

REMEDIES = {alarm.code: alarm.remedy for alarm in ALARMS}
CODES = tuple(REMEDIES)


@dataclass
class Monitor:
    """Tries the rules on a run's metrics. All processes find the same, since metrics are means over
    all of them."""

    config: Config
    log: Callable[[str], object]
    """Prints a line on one process."""
    token_noise: Noise
    """Value of TOKEN_NOISE for the run's dtype."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Metrics of the updates that ended."""
    alarms: dict[str, dict[str, int]] = field(default_factory=dict)
    """Maps a code to `first_update`, the first update with that alarm, and `updates`, how many had
    it."""
    raised: list[dict[str, Any]] = field(default_factory=list)
    """Alarms since the last `take_raised`, as rows of alarms.jsonl."""
    _metrics: dict[str, float] = field(default_factory=dict)
    """Metrics of this update so far."""
    _tried: set[str] = field(default_factory=set)
    _active: set[str] = field(default_factory=set)
    _was_active: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        unknown = sorted(set(self.limits.stop_on) - set(CODES))
        if unknown:
            raise ValueError(
                f"monitor.stop_on has {unknown[0]!r}, which is not the code of an alarm; give some "
                f"of {', '.join(CODES)}"
            )

    @property
    def limits(self) -> MonitorSettings:
        return self.config.monitor

    @property
    def update(self) -> int:
        """Number of the update that runs."""
        return len(self.history)

    def inspect(self, metrics: Metrics) -> None:
        """Add metrics of this update; try each rule once, as soon as all its metrics are there.

        Raises:
            TrainingStopped: an alarm has a code of `monitor.stop_on`.
        """
        self._metrics |= metrics
        for rule in RULES:
            if rule.code not in self._tried and all(name in self._metrics for name in rule.needs):
                self._tried.add(rule.code)
                found = rule.find(self._metrics, self)
                if found is not None:
                    self.raise_alarm(rule.code, found)

    def raise_alarm(self, code: str, found: str) -> None:
        """Count an alarm; print it if the update before did not have it, or stop the run.

        Raises:
            TrainingStopped: the code is in `monitor.stop_on`, or a value is not finite.
        """
        text = f"{code} at update {self.update}: {found} {REMEDIES[code]}"
        self._active.add(code)
        self.raised.append(
            {"step": self.update, "code": code, "message": f"{found} {REMEDIES[code]}"}
        )
        entry = self.alarms.setdefault(code, {"first_update": self.update, "updates": 0})
        entry["updates"] += 1
        if code == NONFINITE or code in self.config.monitor.stop_on:
            raise TrainingStopped(text)
        if code not in self._was_active:
            self.log(f"ppo: warning {text}")

    def take_raised(self) -> list[dict[str, Any]]:
        """Return the alarms since the last call."""
        raised, self.raised = self.raised, []
        return raised

    def end_update(self, metrics: dict[str, float]) -> None:
        """Add `ppo/alarms`, the number of alarms in this update, and start the next update."""
        metrics["ppo/alarms"] = float(len(self._active))
        self.history.append(metrics)
        self._metrics = {}
        self._was_active, self._active, self._tried = self._active, set(), set()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint between two updates must hold."""
        return {
            "history": self.history,
            "alarms": self.alarms,
            "was_active": sorted(self._was_active),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history, self.alarms = state["history"], state["alarms"]
        self.raised = []  # alarms.jsonl already holds those before the checkpoint
        self._was_active, self._active, self._tried = set(state["was_active"]), set(), set()


def write_replay(error: NonFiniteError, update: int, chat: Chat, folder: Path) -> None:
    """Write what is needed to reproduce the fault as JSON: where it was, prompt and response."""
    replay: dict[str, object] = {
        "update": update,
        "phase": error.phase,
        "step": error.step,
        "tensor": error.tensor,
    }
    if error.tree is not None:
        replay |= asdict(error.tree) | {
            "prompt_text": chat.show(error.tree.prompt),
            "response_texts": [chat.decode(list(ids)) for ids in error.tree.responses],
        }
    text = json.dumps(replay, ensure_ascii=False, indent=2) + "\n"
    (folder / REPLAY_FILE).write_text(text, encoding="utf-8")
