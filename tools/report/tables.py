"""Put the figures of policies side by side, from the evaluation and from benchmark tasks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stages.evaluate.report import JUDGES, columns_of
from tools.report.charts import Dot, IntervalRow
from tools.report.figures import Figure, Interval, Source
from tools.report.folders import RunFolder, Stage

REWARD_MODEL = "rm"
BENCHMARK = "benchmark"


@dataclass(frozen=True)
class Cell:
    """One figure of a table, with its interval or its standard error."""

    figure: Figure | None
    interval: Interval | None = None
    error: Figure | None = None
    verdict: str = ""
    """better or worse, if a paired interval excludes 0; otherwise empty."""


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    label: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """A table with a column for each policy of each run."""

    corner: str
    """Heading of the first column, which names the rows."""
    columns: list[str]
    lines: list[Line]


@dataclass(frozen=True)
class Column:
    """One policy of one run, or best-of-n."""

    run: RunFolder
    results: Source
    policy: str
    label: str
    rank: int
    """Number of its colour."""


def colour_names(runs: Sequence[RunFolder]) -> list[str]:
    """Return the names of all policies and stages; each has the same colour in all charts."""
    policies = [
        name
        for run in runs
        if run.evaluation is not None and run.evaluation.results is not None
        for name in columns_of(run.evaluation.results.content)
    ]
    return list(dict.fromkeys([*policies, *(one.name for run in runs for one in run.stages)]))


def find_columns(runs: Sequence[RunFolder], names: Sequence[str]) -> list[Column]:
    """Return a column for each policy of each run that was evaluated.

    Args:
        names: Names of stages and policies, in the order of their colours.
    """
    evaluated = [
        (run, run.evaluation.results)
        for run in runs
        if run.evaluation is not None and run.evaluation.results is not None
    ]
    columns = [
        Column(run, of, name, f"{name}, {run.name}" if len(runs) > 1 else name, names.index(name))
        for run, of in evaluated
        for name in columns_of(of.content)
    ]
    return sorted(columns, key=lambda one: one.rank)  # a policy of one run beside that of the next


def policy_table(columns: Sequence[Column]) -> Table:
    """Return all figures that policies have, the most important first."""
    lines = []
    for label, key, digits in _keys(columns):
        cells = [_cell(column, key, digits) for column in columns]
        if any(cell.figure is not None for cell in cells):
            lines.append(Line(label, cells))
    for key, label in (("right_by_kind", "right: "), ("parts", "part of gold: ")):
        found = [column.results.get(column.policy, key) or {} for column in columns]
        for name in dict.fromkeys(name for of in found for name in of):
            cells = [Cell(column.results.figure(column.policy, key, name)) for column in columns]
            lines.append(Line(label + name, cells))
    return Table("figure", [column.label for column in columns], lines)


def _keys(columns: Sequence[Column]) -> Iterator[tuple[str, str, int]]:
    """Yield label, key in results.json and digits of each row."""
    results = columns[0].results
    baseline, judge = results.get("baseline"), results.get("judge")
    judges = dict.fromkeys(name for one in columns for name in one.results.get("judges") or [])
    yield "right responses", "right", 3
    yield f"right responses, gain on {baseline}", f"right_gain_vs_{baseline}", 3
    yield "right when greedy", "right_greedy", 3
    for name in judges:
        by = "" if name == judge else f"_by_{name}"
        label = f"win rate against {baseline}, by {JUDGES.get(name, name)}"
        yield label, f"win_rate_vs_{baseline}{by}", 3
    for name in judges:
        yield f"{JUDGES.get(name, name)} score", f"{name}_score", 3
        yield f"{JUDGES.get(name, name)} score, gain", f"{name}_gain_vs_{baseline}", 3
        at_equal_length = f"{name}_gain_at_equal_length_vs_{baseline}"
        yield f"{JUDGES.get(name, name)} score, gain at equal length", at_equal_length, 3
    yield f"KL to {baseline}, nats a response", "kl", 3
    yield "loss on held-out text, nats a token", "text_loss", 3
    yield "fact recall", "fact_recall", 3
    yield "tokens a response", "response_tokens", 1
    yield "responses that end", "eos_rate", 3
    yield "different bigrams (distinct-2)", "distinct_2", 3


def _cell(column: Column, key: str, digits: int) -> Cell:
    results, policy = column.results, column.policy
    return Cell(
        results.figure(policy, key, digits=digits),
        results.interval(policy, f"{key}_interval", digits=digits),
        results.figure(policy, f"{key}_error", digits=digits),
    )


def rows_of(columns: Sequence[Column], key: str) -> list[IntervalRow]:
    """Return one figure of all policies for a chart of intervals."""
    rows = []
    for column in columns:
        figure = column.results.figure(column.policy, key)
        ends = column.results.interval(column.policy, f"{key}_interval")
        if figure is not None:
            interval = None if ends is None else (ends.low.value, ends.high.value)
            rows.append(IntervalRow(column.label, figure, interval, column.rank))
    return rows


def dots_against_kl(columns: Sequence[Column], judge: str) -> list[Dot]:
    """Return each policy's score by a judge against its KL; the baseline is at 0."""
    dots = []
    for column in columns:
        score = column.results.figure(column.policy, f"{judge}_score")
        ends = column.results.interval(column.policy, f"{judge}_score_interval")
        kl = column.results.figure(column.policy, "kl")
        is_baseline = column.policy == column.results.get("baseline")
        if score is not None and (kl is not None or is_baseline):
            error = None if ends is None else (ends.low.value, ends.high.value)
            place = 0.0 if kl is None else kl.value
            dots.append(Dot(column.label, place, score.value, column.rank, error))
    return dots


def best_of_path(columns: Sequence[Column], judge: str) -> list[Dot]:
    """Return best-of-n's score against its KL for growing n, of the first run that has it."""
    for column in columns:
        curve = column.results.get("best_of", "by_n")
        if curve and column.policy == column.results.get("best_of", "name"):
            points = list(curve.items())
            return [
                Dot("", point["kl"], point[f"{judge}_score"], column.rank)
                for _, point in points[:-1]
                if f"{judge}_score" in point
            ]
    return []


def table_against_kl(columns: Sequence[Column], judge: str) -> Table:
    """Return what `dots_against_kl` and `best_of_path` have, as a table."""
    lines = [
        Line(column.label, [_cell(column, "kl", 3), _cell(column, f"{judge}_score", 3)])
        for column in columns
    ]
    for column in columns:
        if column.policy == column.results.get("best_of", "name"):
            for n in column.results.get("best_of", "by_n") or {}:
                place = ("best_of", "by_n", n)
                names = ("kl", f"{judge}_score")
                cells = [Cell(column.results.figure(*place, name)) for name in names]
                lines.append(Line(f"best of {n}, {column.run.name}", cells))
    return Table("policy", ["KL, nats a response", "score"], lines)


def calibration_table(results: Source) -> Table:
    """Return the bins of a reward model's reliability diagram."""
    names = ("confidence", "accuracy", "pairs")
    bins = range(len(results.get("calibration") or []))
    lines = [
        Line(f"{one + 1}", [Cell(results.figure("calibration", one, name)) for name in names])
        for one in bins
    ]
    return Table("bin", ["how sure it is", "how often it is right", "pairs"], lines)


def benchmark_tables(stage: Stage) -> list[tuple[str, Table]]:
    """Return the figures of benchmark tasks, and the difference of each policy to each baseline."""
    results = stage.results
    if results is None:
        return []
    policies: list[str] = results.get("policies") or []
    tables = [("Figures of each policy", _by_policy(results, "figures", "value", policies, None))]
    for baseline in results.get("baselines") or []:
        others = [policy for policy in policies if policy != baseline]
        table = _by_policy(results, "tax", "difference", others, baseline)
        tables.append((f"Paired differences to {baseline}", table))
    return [(title, table) for title, table in tables if table.lines]


def _by_policy(
    results: Source, section: str, key: str, policies: Sequence[str], baseline: str | None
) -> Table:
    """Lay out the rows of a section of a benchmark's results, with a column for each policy."""
    places: dict[str, dict[str, Cell]] = {}
    for number, row in enumerate(results.get(section) or []):
        if baseline is not None and row.get("baseline") != baseline:
            continue
        shots = row.get("shots")
        label = f"{row.get('task')}, {row.get('rendering')}, {shots} shots: {row.get('metric')}"
        places.setdefault(label, {})[str(row.get("policy"))] = Cell(
            results.figure(section, number, key),
            results.interval(section, number, "interval"),
            verdict=str(row.get("verdict") or ""),
        )
    lines = [
        Line(label, [cells.get(policy, Cell(None)) for policy in policies])
        for label, cells in places.items()
    ]
    return Table("task and metric", list(policies), lines)
