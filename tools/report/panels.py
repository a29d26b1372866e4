"""The curves of a page: which metrics share a panel, and which alarms it shows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from rlhf.runs.glossary import Metric, by_name
from stages.ppo import glossary as ppo_glossary
from stages.pretrain import glossary as pretrain_glossary
from stages.rm import glossary as rm_glossary
from stages.sft import glossary as sft_glossary
from tools.report.figures import is_number
from tools.report.folders import RunFolder, Stage

SMOOTHED_FROM = 30
"""Number of points from which a curve gets a running mean, which is over a tenth of them and drawn
in front of the raw points."""


MAX_POINTS = 1_000
"""Most points of a curve on a page, so that the page of a long run stays small."""

METRICS = by_name(
    (*ppo_glossary.METRICS, *rm_glossary.METRICS, *sft_glossary.METRICS, *pretrain_glossary.METRICS)
)
"""What the metrics of all stages mean."""


@dataclass(frozen=True)
class Panel:
    """One small plot, with a line for each stage that logs one of the metrics."""

    group: str
    """The stage, in words."""
    lines: Mapping[str, str]
    """Maps the name of each metric to its label, which is empty in a panel with a single one."""
    heading: str = ""
    """Heading where no metric alone gives it. Empty means the title of the first metric."""
    floor: float | None = None
    """Lowest value to show. None means that all are shown."""
    limit: str | None = None
    """Setting below `monitor` beyond which an alarm is raised."""
    codes: tuple[str, ...] = ()
    """Alarms that are raised for what the panel shows."""
    is_worth_a_first_look: bool = True
    """Whether the panel is open when the page is opened."""

    @property
    def metric(self) -> Metric:
        """The first metric, which gives the panel its title, unit and healthy range."""
        return METRICS[next(iter(self.lines))]

    @property
    def title(self) -> str:
        return self.heading or self.metric.title

    @property
    def unit(self) -> str:
        return self.metric.unit

    @property
    def healthy(self) -> tuple[float, float] | None:
        """Range of healthy runs. None means that it depends on the task."""
        return self.metric.healthy_range


PANELS = (
    Panel("PPO", {"ppo/score": "", "ppo/held_out_score": "held out"}),
    Panel(
        "PPO",
        {"ppo/kl": "", "ppo/held_out_kl": "held out"},
        limit="max_kl",
        codes=("PPO_KL", "PPO_NEG_KL", "PPO_REFERENCE"),
    ),
    Panel("PPO", {"ppo/response_tokens": ""}, codes=("PPO_LENGTH",)),
    Panel("PPO", {"ppo/eos_rate": ""}, limit="min_eos_rate", codes=("PPO_NO_EOS",)),
    Panel("PPO", {"ppo/entropy": ""}, codes=("PPO_SAMPLER",)),
    Panel("PPO", {"ppo/ptx_loss": ""}),
    Panel(
        "PPO",
        {"ppo/ppo_grad_norm": "PPO", "ppo/ptx_grad_norm": "text"},
        heading="Norms of the two gradients",
        is_worth_a_first_look=False,
    ),
    Panel(
        "PPO",
        {"ppo/explained_variance": ""},
        floor=-1.0,
        codes=("PPO_VALUE", "PPO_VALUE_CLIP"),
    ),
    Panel("PPO", {"ppo/one_answer": ""}, limit="max_one_answer", codes=("PPO_ONE_ANSWER",)),
    Panel("PPO", {"ppo/distinct_2": ""}, codes=("PPO_REPEAT",)),
    Panel(
        "PPO",
        {"ppo/clip_fraction": ""},
        limit="max_clip_fraction",
        codes=("PPO_CLIP", "PPO_RATIO"),
        is_worth_a_first_look=False,
    ),
    Panel(
        "PPO",
        {"ppo/approx_kl": ""},
        limit="max_update_kl",
        codes=("PPO_UPDATE_KL",),
        is_worth_a_first_look=False,
    ),
    Panel(
        "PPO",
        {"ppo/score_std": "scores", "ppo/advantage_std": "advantages"},
        heading="Spread of scores and advantages",
        codes=("PPO_ZERO_ADV",),
        is_worth_a_first_look=False,
    ),
    Panel("PPO", {"ppo/tokens_per_second": ""}, is_worth_a_first_look=False),
    Panel("Reward model", {"rm/accuracy": "training", "rm/held_out_accuracy": "held out"}),
    Panel("Reward model", {"rm/loss": "training", "rm/held_out_loss": "held out"}),
    Panel("SFT", {"sft/loss": "training", "sft/held_out_loss": "held out"}),
    Panel("Pretraining", {"pretrain/loss": "training", "pretrain/held_out_loss": "held out"}),
)


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str
    stage: Stage
    key: str
    steps: list[float]
    values: list[float]
    run: int
    """Number of the run, for the line's dashes."""
    rank: int
    """Number of the line's colour."""

    @property
    def is_held_out(self) -> bool:
        return "held_out" in self.key

    @property
    def kept(self) -> list[int]:
        """The places of the points that the page has."""
        return thin_out(self.values)

    @property
    def smooth(self) -> list[float] | None:
        """The running mean, or None if there are too few points for one."""
        if self.is_held_out or len(self.values) < SMOOTHED_FROM:
            return None
        return running_mean(self.values, len(self.values) // 20)


@dataclass(frozen=True)
class RaisedAlarm:
    """An alarm that was raised in one or more updates in a row."""

    code: str
    stage: Stage
    run: int
    steps: list[int]
    message: str
    """Empty if a run of an older version left only the code."""
    has_stopped: bool
    """Whether it ended the run."""


@dataclass(frozen=True)
class DrawnPanel:
    """A panel with what runs logged for it."""

    panel: Panel
    curves: list[Curve]
    alarms: list[RaisedAlarm]
    limits: list[float] = field(default_factory=list)
    """Values beyond which an alarm is raised, one for each different setting."""

    @property
    def num_points(self) -> int:
        """Points of the longest curve, as they were logged."""
        return max(len(curve.values) for curve in self.curves)


def find_panels(
    runs: Sequence[RunFolder], alarms: Sequence[RaisedAlarm], names: Sequence[str]
) -> list[DrawnPanel]:
    """Return the panels for which any stage logged a number.

    Args:
        names: Names of stages and policies, in the order of their colours.
    """
    drawn = []
    for panel in PANELS:
        curves = find_curves(panel, runs, names)
        if curves:
            shown = {id(curve.stage) for curve in curves}
            own = [one for one in alarms if one.code in panel.codes and id(one.stage) in shown]
            drawn.append(DrawnPanel(panel, curves, own, _limits(panel, curves)))
    return drawn


def find_curves(panel: Panel, runs: Sequence[RunFolder], names: Sequence[str]) -> list[Curve]:
    """Return the curve of each (run, stage, metric key) that was logged as a number."""
    found: list[tuple[RunFolder, Stage, str, list[tuple[float, float]]]] = []
    for run in runs:
        for stage in run.stages:
            for key in panel.lines:
                points = [
                    (row["step"], row[key])
                    for row in stage.metrics
                    if is_number(row.get(key)) and is_number(row.get("step"))
                ]
                if points:
                    found.append((run, stage, key, points))
    stages = list(dict.fromkeys(stage.name for _, stage, _, _ in found))
    has_runs = len({run.number for run, _, _, _ in found}) > 1
    curves = []
    for run, stage, key, points in found:
        steps, values = zip(*points, strict=True)
        words = [
            run.name if has_runs else "",
            stage.name if len(stages) > 1 else "",
            panel.lines[key],
        ]
        label = " ".join(word for word in words if word) or stage.name
        rank = names.index(stage.name) if stage.name in names else len(names)
        curves.append(Curve(label, stage, key, list(steps), list(values), run.number, rank))
    return curves


def find_alarms(runs: Sequence[RunFolder]) -> list[RaisedAlarm]:
    """Return all alarms of all stages, in the order in which they were first raised."""
    return [alarm for run in runs for stage in run.stages for alarm in _alarms_of(stage, run)]


def _alarms_of(stage: Stage, run: RunFolder) -> Iterator[RaisedAlarm]:
    stopping = (stage.settings.get("monitor") or {}).get("stop_on") or []
    by_code: dict[str, list[dict[str, Any]]] = {}
    for row in stage.alarms:
        by_code.setdefault(str(row.get("code")), []).append(row)
    for code, rows in by_code.items():
        steps = sorted({int(row["step"]) for row in rows if is_number(row.get("step"))})
        is_last = stage.results is None and (code in stopping or code == "PPO_NONFINITE")
        yield RaisedAlarm(code, stage, run.number, steps, str(rows[0].get("message", "")), is_last)
    counted = (stage.results.get("alarms") if stage.results is not None else None) or {}
    if isinstance(counted, dict):
        for code, entry in counted.items():
            if code not in by_code:
                yield RaisedAlarm(code, stage, run.number, [int(entry["first_update"])], "", False)


def running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Return the mean of each value and its neighbours, up to `reach` on either side."""
    sums = [0.0, *accumulate(values)]
    windows = [(max(0, i - reach), min(len(values), i + reach + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in windows]


def thin_out(values: Sequence[float], most: int = MAX_POINTS) -> list[int]:
    """Return the places of the values to draw: all of them, or at most `most` of a longer curve.

    It keeps the first, the last, the lowest and the highest of each of `most` / 4 equal stretches.
    If a stretch is a pixel wide, a line through them looks like a line through all (Jugel et al.
    2014, "M4: A Visualization-Oriented Time Series Data Aggregation").
    """
    if len(values) <= most:
        return list(range(len(values)))
    num_stretches = most // 4
    kept: set[int] = set()
    for number in range(num_stretches):
        start, end = (len(values) * one // num_stretches for one in (number, number + 1))
        stretch = range(start, end)
        kept |= {start, end - 1, min(stretch, key=values.__getitem__)}
        kept.add(max(stretch, key=values.__getitem__))
    return sorted(kept)


def _limits(panel: Panel, curves: Sequence[Curve]) -> list[float]:
    if panel.limit is None:
        return []
    found: list[Any] = [
        (curve.stage.settings.get("monitor") or {}).get(panel.limit) for curve in curves
    ]
    return sorted({float(value) for value in found if is_number(value)})
