"""Numbers of a page that remember where they were read.

Every number is an HTML `data` element: it shows the rounded value, and carries the exact one with
the file and the place in it. A reader can check the page against the run, and so does a test.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup, escape


@dataclass(frozen=True)
class Figure:
    """A number as a file holds it."""

    value: float
    origin: str
    """Number of the run on the page, file, and place in it (RFC 6901):
    `0:results.json#/ppo/right`."""
    digits: int = 3
    """Digits after the point; whole numbers show none."""
    is_percent: bool = False
    """Whether a share is shown as a percentage, with one digit."""

    def __str__(self) -> str:
        if not math.isfinite(self.value):
            return str(self.value)
        if self.is_percent:
            return f"{100 * self.value:.1f}\u00a0%"
        if isinstance(self.value, int):
            return f"{self.value:,}"
        return f"{self.value:.{self.digits}f}"

    def __html__(self) -> str:
        return Markup('<data value="{}" data-origin="{}">{}</data>').format(
            repr(self.value), self.origin, str(self)
        )


@dataclass(frozen=True)
class Interval:
    """The two ends of a 95 % interval."""

    low: Figure
    high: Figure

    def __html__(self) -> str:
        return Markup("{} to {}").format(self.low, self.high)


@dataclass(frozen=True)
class Source:
    """A JSON object that was read from a file, whose numbers become figures."""

    content: dict[str, Any]
    origin: str
    """Number of the run and file: `0:results.json`."""

    def get(self, *place: str | int) -> Any:
        """Return the value at a place, or None if there is none."""
        found: Any = self.content
        for key in place:
            if isinstance(found, dict):
                found = found.get(str(key))
            elif isinstance(found, list) and isinstance(key, int) and key < len(found):
                found = found[key]
            else:
                return None
        return found

    def figure(self, *place: str | int, digits: int = 3, is_percent: bool = False) -> Figure | None:
        """Return the number at a place, or None if no finite number is there."""
        value = self.get(*place)
        if not is_number(value):
            return None
        pointer = "".join(f"/{_escaped(str(key))}" for key in place)
        return Figure(value, f"{self.origin}#{pointer}", digits, is_percent)

    def interval(
        self, *place: str | int, digits: int = 3, is_percent: bool = False
    ) -> Interval | None:
        """Return the interval at a place, or None if two finite numbers are not there."""
        ends = [self.figure(*place, end, digits=digits, is_percent=is_percent) for end in (0, 1)]
        low, high = ends
        return None if low is None or high is None else Interval(low, high)


SentencePart = str | Figure | Interval
"""A part of a sentence."""
Sentence = Sequence[SentencePart]


def to_html(sentence: Sentence) -> Markup:
    """Join the parts of a sentence; texts are escaped."""
    return Markup("").join(escape(part) for part in sentence)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number; JSON of runs holds nan and inf as texts."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
