"""Make a page and write it: one HTML file that fetches nothing and runs one script.

What runs wrote is shown as text only. Jinja escapes it, the drawings are built as elements, and the
Content-Security-Policy allows only the script and the style whose hashes it names.
"""

import base64
import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from rlhf.inputs.whole_files import write_text
from rlhf.runs.folder import PAGE, add_to_mark
from tools.report.charts import (
    IntervalRow,
    draw_calibration,
    draw_intervals,
    draw_panel,
    draw_scatter,
)
from tools.report.figures import Figure, Source, is_number, to_html
from tools.report.folders import RunFolder, Stage
from tools.report.lineage import draw_lineage, find_inputs
from tools.report.panels import MAX_POINTS, DrawnPanel, RaisedAlarm, find_alarms, find_panels
from tools.report.samples import find_samples
from tools.report.settings import compare_runs, compare_with_presets
from tools.report.tables import (
    BENCHMARK,
    Column,
    Table,
    benchmark_tables,
    best_of_path,
    calibration_table,
    colour_names,
    dots_against_kl,
    find_columns,
    policy_table,
    rows_of,
    table_against_kl,
)
from tools.report.verdict import HUMAN_AGREEMENT, REWARD_MODEL, summary, verdict_of

GENERATOR = "instruct-rlhf report"
"""Marks a file as a page of this program, which may replace it."""
HERE = Path(__file__).parent
GROUPS = ("PPO", "Reward model", "SFT", "Pretraining")
"""Groups of panels, in the order in which they are shown."""


@dataclass(frozen=True)
class Chart:
    """A drawing with its title and a note on how to read it."""

    title: str
    svg: Markup
    note: str = ""
    table: Table | None = None
    """The numbers of the drawing, where no other table has them."""


def write_page(runs: Sequence[RunFolder], output: Path | None) -> Path:
    """Write the page of one run or more and return its path.

    Args:
        output: The file to write. None means report.html in the folder of the first run; beside
            other runs, report_vs_NAME.html.

    Raises:
        ValueError: The file is there and was not written by this program.
        OSError: It cannot be written.
    """
    others = [run.folder.resolve().name for run in runs[1:]]
    name = PAGE if not others else f"report_vs_{'_'.join(others)}.html"
    path = runs[0].folder / name if output is None else output
    if path.exists() and not _is_ours(path):
        raise ValueError(
            f"{path} is there and was not written by this program; move it away, or name "
            "another file with --output"
        )
    write_text(path, render(runs))
    if output is None:
        add_to_mark(runs[0].folder, name)
    return path


def render(runs: Sequence[RunFolder]) -> str:
    """Return the page as HTML. Equal runs give equal bytes: it holds no time and nothing random."""
    style = (HERE / "page.css").read_text(encoding="utf-8")
    script = (HERE / "page.js").read_text(encoding="utf-8")
    alarms = find_alarms(runs)
    names = colour_names(runs)
    panels = find_panels(runs, alarms, names)
    return _template().render(
        generator=GENERATOR,
        style=Markup(style),
        script=Markup(script),
        policy=content_policy(style, script),
        data=_to_script_data({f"p{i}": _data_of(one) for i, one in enumerate(panels)}),
        title=" against ".join(run.name for run in runs),
        **_context(runs, panels, alarms, find_columns(runs, names)),
    )


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["sentence"] = to_html
    return environment.get_template("page.html.jinja")


def content_policy(style: str, script: str) -> str:
    """Return a Content-Security-Policy that allows one style sheet and one script, and no fetch."""
    return (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _context(
    runs: Sequence[RunFolder],
    panels: Sequence[DrawnPanel],
    alarms: Sequence[RaisedAlarm],
    columns: Sequence[Column],
) -> dict[str, Any]:
    """Return what the template shows, by name."""
    inputs = {run.number: find_inputs(run) for run in runs}
    samples = find_samples(runs)
    return {
        "runs": runs,
        "verdicts": [(run, verdict_of(run, alarms)) for run in runs],
        "differences": compare_runs(runs) if len(runs) > 1 else [],
        "table": policy_table(columns) if columns else None,
        "outcomes": list(_outcomes(columns)),
        "groups": _grouped(panels),
        "samples": samples.shown,
        "num_prompts": samples.num_prompts,
        "read_in_part": [one for one in samples.stages if one.num_rows_left_out],
        "max_points": MAX_POINTS,
        "reward_models": [
            (run, stage, list(_about_rm(run, stage)))
            for run in runs
            for stage in run.of("rm")
            if stage.results is not None
        ],
        "labels": [
            (run, stage, list(_about_labels(stage.results)))
            for run in runs
            for stage in run.of("collect")
            if stage.results is not None
        ],
        "overoptimisation": list(_overoptimisation(columns)),
        "benchmarks": [
            (run, title, table)
            for run in runs
            for stage in run.of(BENCHMARK)
            for title, table in benchmark_tables(stage)
        ],
        "lineages": [
            (run, draw_lineage(run, inputs[run.number]), inputs[run.number])
            for run in runs
            if inputs[run.number]
        ],
        "settings": [(run, compare_with_presets(run)) for run in runs],
        "cards": [(run, [_card(stage) for stage in run.stages]) for run in runs],
    }


def _card(stage: Stage) -> dict[str, Any]:
    """Return what the card of a stage shows."""
    results = stage.results
    state = "finished"
    if not stage.is_finished:
        state = "at work" if stage.is_running else "not finished"
    seconds = None
    if results is not None:
        of_evaluation = results.figure("seconds", stage.stage, digits=1)
        seconds = of_evaluation or results.figure("seconds", digits=1)
    commit = stage.lineage.get("commit")
    versions = stage.lineage.get("versions") or {}
    return {
        "stage": stage,
        "state": state,
        "seconds": seconds,
        "commit": commit,
        "seed": stage.seed,
        "command": _command(stage),
        "sentences": list(summary(stage)),
        "counts": _counts(results) if stage.stage.startswith("data") else [],
        "versions": ", ".join(f"{name} {versions[name]}" for name in versions),
    }


def _command(stage: Stage) -> str | None:
    """Return the command that makes the stage again, into another folder."""
    if not (stage.folder / "config.yaml").is_file():
        return None
    program = stage.stage if "." in stage.stage else f"stages.{stage.stage}"
    return f"python -m {program} --config {stage.folder / 'config.yaml'} --output_dir FOLDER"


def _counts(results: Source | None) -> list[tuple[str, Figure]]:
    if results is None:
        return []
    found = [(name, results.figure(name)) for name in results.content]
    return [(name, figure) for name, figure in found if figure is not None]


def _outcomes(columns: Sequence[Column]) -> list[Chart]:
    """Draw what policies are judged by, substance first."""
    if not columns:
        return []
    results = columns[0].results
    baseline = results.get("baseline")
    wanted: list[tuple[str, str, float | None, str]] = [
        ("Right responses", "right", None, "Share of sampled responses, with 95 % intervals."),
        ("Right when greedy", "right_greedy", None, "Share, at temperature 0."),
    ]
    judges = results.get("judges") or []
    for judge in judges:
        by = "" if judge == results.get("judge") else f"_by_{judge}"
        name = "the reward model" if judge == REWARD_MODEL else judge
        note = "What the policy was trained to please." if judge == REWARD_MODEL else ""
        key = f"win_rate_vs_{baseline}{by}"
        wanted.append((f"Win rate against {baseline}, by {name}", key, 0.5, note))
    wanted.append(("Loss on held-out text", "text_loss", None, "Nats a token; lower is better."))
    charts = []
    for title, key, reference, note in wanted:
        rows = rows_of(columns, key)
        if rows:
            charts.append(Chart(title, draw_intervals(rows, title, reference), note))
    return charts


def _overoptimisation(columns: Sequence[Column]) -> list[Chart]:
    """Draw each judge's score against KL; over-optimisation makes the judges diverge."""
    charts = []
    for judge in columns[0].results.get("judges") or [] if columns else []:
        dots, path = dots_against_kl(columns, judge), best_of_path(columns, judge)
        if len(dots) > 2 or path:
            name = "the reward model" if judge == REWARD_MODEL else judge
            title = f"Score by {name} against KL"
            svg = draw_scatter(dots, path, title, "KL to the baseline, nats a response")
            charts.append(Chart(title, svg, table=table_against_kl(columns, judge)))
    return charts


def _about_rm(run: RunFolder, stage: Stage) -> list[Chart]:
    """Draw accuracy against its baselines, calibration, and accuracy by part of gold."""
    results = stage.results
    assert results is not None
    charts = []
    rows = [
        _interval_row(results, "reward model", ("pair_accuracy",), 0),
        _interval_row(results, "the same, by gold", ("pair_accuracy_gold",), 0),
        _interval_row(results, "length alone", ("length_baseline",), 1),
    ]
    for collect in run.of("collect"):
        if collect.results is not None:
            rows.append(_interval_row(collect.results, "labelers among them", ("agreement",), 2))
    found = [row for row in rows if row is not None]
    if found:
        title = "Pairs ordered right"
        charts.append(Chart(title, draw_intervals(found, title, 0.5), "Dashed: a coin."))
    bins = [
        (one["confidence"], one["accuracy"], one["pairs"])
        for one in results.get("calibration") or []
        if is_number(one.get("accuracy"))
    ]
    if bins:
        note = "On the dashed line it is as often right as it is sure. Large dots hold many pairs."
        drawn = draw_calibration(bins)
        charts.append(Chart("Calibration", drawn, note, calibration_table(results)))
    evaluation = run.evaluation
    if evaluation is not None and evaluation.results is not None:
        parts = evaluation.results.get(REWARD_MODEL, "accuracy_by_part") or {}
        figures = [
            _interval_row(evaluation.results, name, (REWARD_MODEL, "accuracy_by_part", name), 0)
            for name in parts
        ]
        by_part = [row for row in figures if row is not None]
        if by_part:
            title = "Accuracy on pairs that differ in one part"
            note = "Pairs of the baseline's own samples, judged by gold. Dashed: a coin."
            charts.append(Chart(title, draw_intervals(by_part, title, 0.5), note))
    return charts


def _about_labels(results: Source) -> list[Chart]:
    """Draw how far labelers agree, and who ranked how much."""
    charts = []
    own = _interval_row(results, "these labelers", ("agreement",), 0)
    if own is not None:
        title = "Pairs on which two labelers agree"
        charts.append(Chart(title, draw_intervals([own], title, 0.5), HUMAN_AGREEMENT + "."))
    for key, title in (
        ("num_rankings_by_labeler", "Rankings of each labeler"),
        ("num_rankings_by_k", "Rankings with K responses"),
    ):
        found = [_interval_row(results, name, (key, name), 0) for name in results.get(key) or {}]
        rows = [row for row in found if row is not None]
        if rows:
            charts.append(Chart(title, draw_intervals(rows, title, 0.0, has_bars=True)))
    return charts


def _interval_row(
    results: Source, label: str, place: Sequence[str], rank: int
) -> IntervalRow | None:
    """Return the figure at a place with the interval beside it; None if it is not there."""
    figure = results.figure(*place)
    ends = results.interval(*place[:-1], f"{place[-1]}_interval")
    if figure is None:
        return None
    interval = None if ends is None else (ends.low.value, ends.high.value)
    return IntervalRow(label, figure, interval, rank)


@dataclass(frozen=True)
class ShownPanel:
    """A panel on the page."""

    name: str
    """Identifier by which the script finds its data."""
    drawn: DrawnPanel
    svg: Markup


@dataclass(frozen=True)
class Group:
    """The panels of one kind of stage."""

    title: str
    first: list[ShownPanel]
    rest: list[ShownPanel]
    """Panels that are shown on demand."""


def _grouped(panels: Sequence[DrawnPanel]) -> list[Group]:
    """Group drawn panels by the kind of stage; the ones with alarms are always shown."""
    groups = []
    for title in GROUPS:
        own = [
            ShownPanel(f"p{i}", one, draw_panel(one, f"p{i}"))
            for i, one in enumerate(panels)
            if one.panel.group == title
        ]
        first = [one for one in own if one.drawn.panel.is_worth_a_first_look or one.drawn.alarms]
        if own:
            groups.append(Group(title, first, [one for one in own if one not in first]))
    return groups


def _data_of(drawn: DrawnPanel) -> dict[str, Any]:
    """Return the points of a panel that the page has, as metrics.jsonl has them, for its script."""
    return {
        "lines": [
            {
                "label": curve.label,
                "origin": f"{curve.stage.origin}metrics.jsonl",
                "key": curve.key,
                "x": [curve.steps[place] for place in curve.kept],
                "y": [curve.values[place] for place in curve.kept],
            }
            for curve in drawn.curves
        ],
    }


def _to_script_data(data: dict[str, Any]) -> Markup:
    """Return JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _is_ours(path: Path) -> bool:
    with path.open(encoding="utf-8", errors="replace") as file:
        return f'content="{GENERATOR}"' in file.read(2_000)
