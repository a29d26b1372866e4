"""Run ours and theirs alternately on one workload, and check that both did the same work."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.protocol import Worker
from benchmarks.workload import Workload

SIDES = ("ours", "theirs")

LOSS_TOLERANCE = 1e-5
"""RM: largest difference between the losses of the first step, in nats a pair."""
SCORE_TOLERANCE = 1e-4
"""PPO: largest difference between mean scores and between value losses in the first update, which
samples greedily."""
RATIO_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.05}
"""PPO: largest distance from 1 of the mean ratio of new to old probability in the first step on a
rollout."""


class UnequalWork(ValueError):
    """Raised when the two sides computed different things, so their times cannot be compared."""


def compare(
    work: Workload,
    commands: Mapping[str, Sequence[str]],
    *,
    num_pairs: int,
    num_threads: int,
    log_dir: Path,
    log: Callable[[str], object] = print,
) -> dict[str, Any]:
    """Measure one row: a checked warm-up of both sides, then `num_pairs` samples of each in turn.

    Args:
        commands: the commands that start "ours" and "theirs".

    Raises:
        UnequalWork: the two sides report different figures for the warm-up.
        WorkerError: a side failed.
    """
    workers = {}
    try:
        for side in SIDES:
            path = log_dir / f"{work.name}-{side}.log"
            workers[side] = Worker(commands[side], work, num_threads=num_threads, log=path)
        facts = {side: workers[side].facts for side in SIDES}  # waits until both are loaded
        first = {side: workers[side].run() for side in SIDES}
        checked = check_same_work(work, first["ours"], first["theirs"])
        samples: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        for number in range(1, num_pairs + 1):
            for side in SIDES:
                samples[side].append(workers[side].run())
            ours, theirs = (samples[side][-1]["seconds"] for side in SIDES)
            log(
                f"{work.name}: pair {number} of {num_pairs}: ours {ours:.2f} s, theirs "
                f"{theirs:.2f} s, {theirs / ours:.2f} times"
            )
    finally:
        for worker in workers.values():
            worker.close()
    return make_row(work, samples, facts, checked)


def check_same_work(
    work: Workload, ours: Mapping[str, Any], theirs: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Compare the first samples; return each compared figure as name -> [ours, theirs].

    Raises:
        UnequalWork: a figure differs; the message has both values.
    """
    if work.kind == "rm":
        return _require_close(work, ours, theirs, {"loss": LOSS_TOLERANCE})
    if not ours["new_tokens"] == theirs["new_tokens"] == sum(work.response_lengths):
        raise UnequalWork(
            f"{work.name}: ours sampled {ours['new_tokens']} tokens and theirs "
            f"{theirs['new_tokens']}; {sum(work.response_lengths)} were to be"
        )
    tolerance = RATIO_TOLERANCE[work.dtype]
    for side, found in zip(SIDES, (ours, theirs), strict=True):
        if not abs(found["ratio"] - 1) <= tolerance:
            raise UnequalWork(
                f"{work.name}: the first ratio of {side} is {found['ratio']}; it must be 1 within "
                f"{tolerance}"
            )
    compared = {}
    if work.dtype == "float32":  # in bfloat16 the two sides choose different likeliest tokens
        compared["score"] = SCORE_TOLERANCE
        if work.end_positions is None:  # TRL puts the score after the end of a short response
            compared["value_loss"] = SCORE_TOLERANCE
    return {
        "new_tokens": [ours["new_tokens"], theirs["new_tokens"]],
        "ratio": [ours["ratio"], theirs["ratio"]],
        **_require_close(work, ours, theirs, compared),
    }


def make_row(
    work: Workload,
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    facts: Mapping[str, Mapping[str, Any]],
    checked: Mapping[str, Any],
) -> dict[str, Any]:
    """Make a row of the results: ratios first, then what they were computed from."""
    seconds = {side: [sample["seconds"] for sample in samples[side]] for side in SIDES}
    peaks = {side: max(sample["peak_bytes"] for sample in samples[side]) for side in SIDES}
    return {
        "name": work.name,
        "time_ratio": median_ratio(seconds["theirs"], seconds["ours"]),
        "memory_ratio": peaks["ours"] / peaks["theirs"],
        "dtype": work.dtype,
        "prompts": len(work.prompts),
        "tokens": work.num_tokens,
        "pairs_of_responses": work.num_pairs,
        "response_lengths": work.response_lengths if work.kind == "ppo" else None,
        "checked": dict(checked),
        **{
            side: {
                "seconds": seconds[side],
                "median_seconds": statistics.median(seconds[side]),
                "peak_bytes": peaks[side],
                "prompts_per_second": len(work.prompts) / statistics.median(seconds[side]),
                "tokens_per_second": work.num_tokens / statistics.median(seconds[side]),
                "phases": median_phases(samples[side]),
                **facts[side],
            }
            for side in SIDES
        },
    }


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Return the median over pairs of numerator / denominator.

    The sides of a pair run one after the other, so a machine that slows down slows both. The ratio
    of two medians would not have this advantage.
    """
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def median_phases(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the median seconds of every phase that the samples report."""
    names = samples[0].get("phases", {})
    return {name: statistics.median(sample["phases"][name] for sample in samples) for name in names}


def _require_close(
    work: Workload,
    ours: Mapping[str, Any],
    theirs: Mapping[str, Any],
    tolerances: Mapping[str, float],
) -> dict[str, list[float]]:
    for name, tolerance in tolerances.items():
        if not abs(ours[name] - theirs[name]) <= tolerance:
            raise UnequalWork(
                f"{work.name}: the first {name} is {ours[name]} with ours and {theirs[name]} with "
                f"theirs, more than {tolerance} apart: they do not compute the same thing"
            )
    return {name: [ours[name], theirs[name]] for name in tolerances}
