"""Lay out results as Markdown tables, which the screen and benchmark.md both show."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
PLACE = ("task", "rendering", "shots", "metric")
"""Keys that say what a figure is about; a table has one row for each combination."""


def format_results(results: Mapping[str, Any]) -> str:
    """Return the tables of results.json: figures, differences to each baseline, learning curves."""
    figures: list[Row] = results["figures"]
    policies: list[str] = results["policies"]
    parts = ["# Benchmark tasks", _head(results), "## Figures", _figures(figures, policies)]
    for baseline in results["baselines"]:
        differences = [row for row in results["tax"] if row["baseline"] == baseline]
        if differences:
            others = [policy for policy in policies if policy != baseline]
            parts += [f"## Against {baseline}", _differences(differences, others)]
    curves = _curves(figures)
    if curves:
        parts += ["## Learning in context: figures by number of shots", curves]
    return "\n\n".join(parts) + "\n"


def _head(results: Mapping[str, Any]) -> str:
    lines = [
        f"- {name}: {task['questions']} questions, {task['source']}"
        for name, task in results["tasks"].items()
    ]
    by_policy: dict[str, float] = {}
    for row in results["cpu_seconds"]:
        by_policy[row["policy"]] = by_policy.get(row["policy"], 0.0) + row["seconds"]
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in by_policy.items())
    return "\n".join(
        [
            *lines,
            f"- CPU seconds, engine {results['engine']}: {seconds}",
            "- Intervals are 95 %. Differences are paired: the same questions for both policies.",
        ]
    )


def _figures(figures: Sequence[Row], policies: Sequence[str]) -> str:
    found = {(*_place(row), row["policy"]): _value(row) for row in figures}
    return _by_policy(figures, policies, found)


def _differences(differences: Sequence[Row], policies: Sequence[str]) -> str:
    found = {
        (*_place(row), row["policy"]): _signed(row["difference"])
        + _interval(row["interval"])
        + (f" {row['verdict']}" if row["verdict"] else "")
        for row in differences
    }
    return _by_policy(differences, policies, found)


def _by_policy(
    rows: Sequence[Row], policies: Sequence[str], found: Mapping[tuple[Any, ...], str]
) -> str:
    places = dict.fromkeys(_place(row) for row in rows)
    cells = [
        [*map(str, place), *(found.get((*place, policy), "-") for policy in policies)]
        for place in places
    ]
    return _table([*PLACE, *policies], cells)


def _curves(figures: Sequence[Row]) -> str:
    """Make a table of the figures that were measured with several numbers of shots; "" if none."""
    by_curve: dict[tuple[str, ...], dict[int, Row]] = {}
    for row in figures:
        curve = (row["policy"], row["task"], row["rendering"], row["metric"])
        by_curve.setdefault(curve, {})[row["shots"]] = row
    curves = {curve: points for curve, points in by_curve.items() if len(points) > 1}
    shots = sorted({number for points in curves.values() for number in points})
    cells = [
        [*curve, *(_value(points[number]) if number in points else "-" for number in shots)]
        for curve, points in curves.items()
    ]
    return (
        _table(["policy", "task", "rendering", "metric", *map(str, shots)], cells) if cells else ""
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table whose columns are aligned, so that the screen can show it too."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = [
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([shown[0], rule, *shown[1:]])


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[key] for key in PLACE)


def _value(row: Row) -> str:
    return _number(row["value"]) + _interval(row["interval"])


def _interval(interval: Sequence[Any]) -> str:
    """Format an interval; "" if it is unknown, as over a single question."""
    if any(isinstance(bound, str) or math.isnan(bound) for bound in interval):
        return ""
    low, high = interval
    return f" ({_number(low)}, {_number(high)})"


def _signed(value: Any) -> str:
    return ("+" if isinstance(value, float) and value >= 0 else "") + _number(value)


def _number(value: Any) -> str:
    """Format a number with three digits after the point, or with two if it is 100 or more."""
    if isinstance(value, str):
        return value  # JSON cannot hold infinity, so results.json has it as text
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.2f}"
