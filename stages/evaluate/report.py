"""Format the results for readers: one table of text, and the samples side by side."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from rlhf.inputs.records import PromptLike, to_messages
from stages.evaluate.config import GOLD, REWARD_MODEL, SAMPLE_KEYS

JUDGES = {GOLD: "gold", REWARD_MODEL: "reward model"}
"""Maps the names of judges to what people call them."""
NUM_IN_TABLE = 10
"""Prompts in the table at the top of the samples."""

NESTED = {
    "right_accuracy_by_kind": "accuracy where only right or wrong differs: ",
    "accuracy_by_part": "accuracy where only this part differs: ",
}
"""Maps keys of a report that hold figures by name to the text before each name."""

NO_REPORTS = ("best_of", "prompts", "seconds", "speed")
"""Keys of results.json that hold an object and are no report of a stage."""
NOTHING = "-"
INTERVAL = "  95 % interval"

Rows = list[tuple[str, list[str]]]
"""Holds the label and the cells of each line."""


@dataclass(frozen=True)
class Block:
    """Holds one block of lines of the table."""

    title: str
    columns: tuple[str, ...]
    """Names above the cells; empty if each row has a single cell."""
    rows: Rows


def format_results(results: Mapping[str, Any]) -> str:
    """Format results.json as one table: the policies in columns, then reports, speed, seconds."""
    policies = {name: results[name] for name in columns_of(results)}
    reports = {
        name: value
        for name, value in results.items()
        if isinstance(value, dict) and name not in {*policies, *NO_REPORTS}
    }
    speeds = results.get("speed", {})
    prompts = results["prompts"]
    title = (
        f"Results on {prompts['used']} held-out prompts, {_count_samples(prompts)} at temperature "
        f"{prompts['temperature']:g}"
    )
    blocks = [
        Block(title, tuple(policies), _policy_rows(results, policies)),
        *(Block(f"Report: {name}", (), _report_rows(value)) for name, value in reports.items()),
        *(Block(f"Speed: {name}", (), _report_rows(value)) for name, value in speeds.items()),
        Block("Seconds", (), _seconds_rows(results["seconds"])),
    ]
    return "\n".join(["", *_lay_out(blocks)])


def columns_of(results: Mapping[str, Any]) -> list[str]:
    """Return the keys of the policies, and of best-of-n if it was measured."""
    best_of = results.get("best_of")
    return [*results["policies"], *([] if best_of is None else [best_of["name"]])]


def format_samples(
    rows: Sequence[Mapping[str, Any]], warnings: Sequence[Mapping[str, Any]], num_shown: int
) -> str:
    """Format samples as Markdown: warnings, a table, then prompts with all their responses.

    Args:
        rows: All rows of samples.jsonl. The table and the list after it show the first prompts.
        num_shown: Prompts in the list after the table.
    """
    parts = ["# Samples on held-out prompts\n"]
    if warnings:
        lines = [f"- **{one['code']}**: {_escaped(one['message'])}" for one in warnings]
        parts.append("\n".join([*lines, ""]))
    in_table = [row for row in rows if row["prompt_number"] < NUM_IN_TABLE]
    parts.append("\n".join([*_table_of_samples(in_table), ""]))
    shown = [row for row in rows if row["prompt_number"] < num_shown]
    for number, of_prompt in groupby(shown, key=lambda row: row["prompt_number"]):
        responses = list(of_prompt)
        parts.append(f"## Prompt {number + 1}\n\n{_fenced(_prompt_text(responses[0]['prompt']))}\n")
        for row in responses:
            parts.append(f"**{row['policy']}**{_scores(row)}\n\n{_fenced(row['response'])}\n")
    return "\n".join(parts)


def _table_of_samples(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Make a table of first responses, with a line for each prompt and a column for each policy."""
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    lines = [["prompt", *policies], ["---"] * (1 + len(policies))]
    for _, of_prompt in groupby(rows, key=lambda row: row["prompt_number"]):
        responses = list(of_prompt)
        first = {row["policy"]: row for row in reversed(responses)}
        cells = [_cell(first[name]) for name in policies]
        lines.append([_escaped(_prompt_text(responses[0]["prompt"])), *cells])
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _cell(row: Mapping[str, Any]) -> str:
    return _escaped(row["response"]) + ("" if row["finished"] else " (cut)")


def _scores(row: Mapping[str, Any]) -> str:
    """Format the judges' scores of a response: all keys of the row that are not SAMPLE_KEYS."""
    marks = [
        f"{JUDGES.get(name, name)} {value:.2f}"
        for name, value in row.items()
        if name not in SAMPLE_KEYS
    ]
    marks += [f"{name} {value:.2f}" for name, value in row.get("parts", {}).items()]
    marks += [] if row["finished"] else ["cut before its end"]
    return f" ({', '.join(marks)})" if marks else ""


def _escaped(text: str) -> str:
    """Escape text into one line that Markdown shows unchanged, even in a table."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    text = re.sub(r"[\\`*_\[\]#|~]", r"\\\g<0>", text)
    return "<br>".join(text.splitlines()) or "(nothing)"


def _count_samples(prompts: Mapping[str, Any]) -> str:
    count = prompts["samples_per_prompt"]
    return "1 response each" if count == 1 else f"{count} responses each"


def _policy_rows(results: Mapping[str, Any], policies: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Make rows for the figures that any policy has, the most important first."""
    baseline, judge = results["baseline"], results["judge"]
    judges = {name: JUDGES.get(name, name) for name in results["judges"]}
    other = [name for name in judges if name != judge]
    win_rate = f"win_rate_vs_{baseline}"
    lines: list[tuple[str, str, int]] = [
        ("right responses", "right", 3),
        (f"right responses, gain on {baseline}", f"right_gain_vs_{baseline}", 3),
        ("right when greedy", "right_greedy", 3),
    ]
    if judge is not None:
        lines += [(f"win rate against {baseline}, by {judges[judge]}", win_rate, 3)]
    lines += [(f"win rate by {judges[name]}", f"{win_rate}_by_{name}", 3) for name in other]
    for name, label in judges.items():
        lines += [(f"{label} score", f"{name}_score", 3)]
        lines += [(f"{label} score, gain on {baseline}", f"{name}_gain_vs_{baseline}", 3)]
        at_equal_length = f"{name}_gain_at_equal_length_vs_{baseline}"
        lines += [("  the same at equal length", at_equal_length, 3)]
    lines += [
        (f"KL to {baseline}, nats a response", "kl", 3),
        ("KL by the k3 estimate", "kl_k3", 3),
        ("response length, tokens", "response_tokens", 1),
        ("responses that end (eos rate)", "eos_rate", 3),
        ("distinct token pairs (distinct-2)", "distinct_2", 3),
        ("loss on held-out text, nats a token", "text_loss", 3),
        ("fact recall", "fact_recall", 3),
    ]
    rows: Rows = []
    for label, key, digits in lines:
        values = [policy.get(key) for policy in policies.values()]
        if any(value is not None for value in values):
            rows.append((label, [_number(value, digits) for value in values]))
        intervals = [policy.get(f"{key}_interval") for policy in policies.values()]
        if any(interval is not None for interval in intervals):
            rows.append((INTERVAL, [_interval(one, digits) for one in intervals]))
        errors = [policy.get(f"{key}_error") for policy in policies.values()]
        if any(error is not None for error in errors):
            rows.append(("  standard error", [_number(error, digits) for error in errors]))
    return rows + _nested_rows(policies)


def _nested_rows(policies: Mapping[str, Mapping[str, Any]]) -> Rows:
    """Make rows for figures by kind and by part, and for the share of the most frequent
    response."""
    rows: Rows = []
    for key, label in (("right_by_kind", "right: "), ("parts", "part of gold: ")):
        names = dict.fromkeys(name for policy in policies.values() for name in policy.get(key, {}))
        for name in names:
            values = [policy.get(key, {}).get(name) for policy in policies.values()]
            rows.append((label + name, [_number(value, 3) for value in values]))
    shares = [policy.get("most_frequent_response", {}).get("share") for policy in policies.values()]
    rows.append(("share of most frequent response", [_number(share, 3) for share in shares]))
    return rows


def _report_rows(report: Mapping[str, Any]) -> Rows:
    """Make rows for the top-level numbers of a report, each interval under its figure.

    results.json has the rest.
    """
    rows: Rows = []
    for key, value in report.items():
        label = key.replace("_", " ")
        if _is_interval(value):
            of_row_above = key.removesuffix("_interval") in report
            name = INTERVAL if of_row_above else f"{INTERVAL} of {label}"
            rows.append((name, [_interval(value, 3)]))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            rows.append((label, [_number(value, 3)]))
    for key, label in NESTED.items():
        rows += [(label + name, [_number(value, 3)]) for name, value in report.get(key, {}).items()]
    return rows + _phase_rows(report.get("phase_seconds", {}))


def _phase_rows(phases: Mapping[str, float]) -> Rows:
    """Make rows for the phases of a stage's updates, with seconds and shares of the whole."""
    whole = phases.get("update", 0.0)
    longest_first = sorted(phases.items(), key=lambda phase: -phase[1])
    return [
        (f"time: {name}", [f"{seconds:.1f} s, {seconds / whole:4.0%}"])
        for name, seconds in longest_first
        if name != "update" and whole > 0
    ]


def _seconds_rows(seconds: Mapping[str, float]) -> Rows:
    return [(name.replace("_", "-"), [_number(value, 1)]) for name, value in seconds.items()]


def _lay_out(blocks: Sequence[Block]) -> list[str]:
    """Lay out blocks under each other in common columns, labels left and cells right."""
    rows = [row for block in blocks for row in block.rows]
    cells = [cell for _, row in rows for cell in row]
    names = [name for block in blocks for name in block.columns]
    label_width = max(len(label) for label, _ in rows)
    width = max(len(cell) for cell in [*cells, *names]) + 3
    titles = [len(block.title) for block in blocks]
    total = max(label_width + width * max(len(row) for _, row in rows), *titles)
    lines = ["=" * total]
    for block in blocks:
        lines += [block.title]
        if block.columns:
            lines += [" " * label_width + "".join(name.rjust(width) for name in block.columns)]
        lines += ["-" * total]
        for label, row in block.rows:
            lines += [label.ljust(label_width) + "".join(cell.rjust(width) for cell in row)]
        lines += [""]
    return [*lines[:-1], "=" * total]


def _is_interval(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(x, int | float) for x in value)
    )


def _number(value: Any, digits: int) -> str:
    if not isinstance(value, int | float):
        return NOTHING
    return str(value) if isinstance(value, int) else f"{value:.{digits}f}"


def _interval(interval: Any, digits: int) -> str:
    """Format an interval, or NOTHING if it is unknown, as over a single prompt."""
    if not _is_interval(interval) or any(map(math.isnan, interval)):
        return NOTHING
    low, high = interval
    return f"{low:.{digits}f}..{high:.{digits}f}"


def _prompt_text(prompt: PromptLike) -> str:
    messages = to_messages(prompt)
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in messages)


def _fenced(text: str) -> str:
    """Fence text so that Markdown shows it unchanged: longer than any fence within the text."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
