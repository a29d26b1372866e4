"""Turn values by question into figures with intervals, and into differences between policies."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.measuring.statistics import (
    Estimate,
    aggregate_difference,
    aggregate_estimate,
    bootstrap_interval,
    mean_and_error,
    paired_difference,
    wilson_interval,
)

Values = Sequence[Sequence[Any]]
"""For each question, one value for each draw or sample."""


@dataclass(frozen=True)
class Metric:
    """Says how to aggregate the values of a metric, and whether higher is better."""

    higher_is_better: bool
    aggregate: Callable[[list[Any]], float] | None = None
    """None means the mean; otherwise the harness's function, as for a perplexity."""


def figure(values: Values, metric: Metric, seed: int) -> dict[str, Any]:
    """Return a metric's value over all questions, its 95 % interval and its standard error.

    A share of questions that were each answered once gets Wilson's interval. Everything else gets a
    bootstrap over questions. `error` is the standard error over questions; only means have one.
    """
    if metric.aggregate is not None:
        estimate = aggregate_estimate(values, metric.aggregate, seed)
        return {"value": estimate.value, "interval": estimate.interval}
    means = [sum(of_question) / len(of_question) for of_question in values]
    value, error = mean_and_error(means)
    is_share = all(len(of_question) == 1 for of_question in values) and {*means} <= {0.0, 1.0}
    interval = (
        wilson_interval(value, len(means))
        if is_share
        else bootstrap_interval([[mean] for mean in means], seed)
    )
    return {"value": value, "interval": interval, "error": error}


def difference(values: Values, baseline: Values, metric: Metric, seed: int) -> dict[str, Any]:
    """Return a policy's figure minus the baseline's on the same questions, and a verdict.

    The interval comes from a bootstrap over questions, which draws the values of both policies
    together. The verdict is "better" or "worse" if the interval excludes 0, and otherwise "".
    """
    if metric.aggregate is None:
        estimate = paired_difference(values, baseline, seed)
    else:
        estimate = aggregate_difference(values, baseline, metric.aggregate, seed)
    return {
        "difference": estimate.value,
        "interval": estimate.interval,
        "verdict": _verdict(estimate, metric.higher_is_better),
    }


def _verdict(estimate: Estimate, higher_is_better: bool) -> str:
    low, high = estimate.interval
    if not (low > 0 or high < 0):
        return ""
    return "better" if (low > 0) == higher_is_better else "worse"


def alignment_tax(
    values: Mapping[str, Values], baselines: Sequence[str], metric: Metric, seed: int
) -> list[dict[str, Any]]:
    """Compare every policy with every baseline that was measured on the same task variant."""
    return [
        {"policy": policy, "baseline": baseline}
        | difference(of_policy, values[baseline], metric, seed)
        for baseline in baselines
        if baseline in values
        for policy, of_policy in values.items()
        if policy != baseline
    ]
