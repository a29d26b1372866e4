"""Defines records that say what a logged number and an alarm mean.

Each stage that logs has a table of these records in its glossary.py. docs/metrics.md is made from
the tables (`python -m tools.metrics_page`), and the report takes titles, units and healthy ranges
from them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

ANY_NAME = "NAME"
"""Stands for a name that a run fills in, as in `ppo/part/NAME`."""


@dataclass(frozen=True)
class Metric:
    """Describes one number of metrics.jsonl."""

    name: str
    unit: str
    """Unit, such as "nats a token". Empty for a number without one."""
    meaning: str
    healthy: str = ""
    """How the number behaves in a healthy run, in words."""
    healthy_range: tuple[float, float] | None = None
    """Lowest and highest value of healthy runs. None means that it depends on the task."""
    otherwise: str = ""
    """What to do if the number is not healthy."""
    title: str = ""
    """Heading of the metric's curve in the report. Empty if it heads no curve."""


@dataclass(frozen=True)
class Alarm:
    """Describes one kind of alarm or warning."""

    code: str
    """Stable name, which scripts may look for."""
    seen: str
    """What the program saw."""
    cause: str
    """The likely cause."""
    remedy: str


def by_name(metrics: Iterable[Metric]) -> dict[str, Metric]:
    """Return the metrics by their names.

    Raises:
        ValueError: Two metrics have one name.
    """
    found: dict[str, Metric] = {}
    for metric in metrics:
        if metric.name in found:
            raise ValueError(f"{metric.name} is described twice; keep one of the two")
        found[metric.name] = metric
    return found
