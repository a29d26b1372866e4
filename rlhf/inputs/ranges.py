"""Says in the type of a setting which numbers it may have, and refuses all others.

    @dataclass(frozen=True, kw_only=True)
    class Settings(Ranged):
        batch_size: PositiveInt = 64
        held_out: Annotated[float, Range(above=0, below=1)] | None = None

`--help` shows the range as part of the type.
"""

import dataclasses
import math
import typing
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True, repr=False)
class Range:
    """A range from `low` or above `above`, to `high` or below `below`; NaN is never in it."""

    low: float = -math.inf
    above: float = -math.inf
    high: float = math.inf
    below: float = math.inf
    may_be_infinite: bool = False

    def __contains__(self, value: float) -> bool:
        is_in = self.low <= value <= self.high and value > self.above
        return is_in and (value < self.below or (self.may_be_infinite and value == math.inf))

    def __repr__(self) -> str:
        if self.high < math.inf:
            return f"{self.low:g} to {self.high:g}"
        start = f"above {self.above:g}" if self.above > -math.inf else f"{self.low:g} or more"
        if self.below < math.inf:
            return f"{start}, below {self.below:g}"
        return f"{start}, .inf for no limit" if self.may_be_infinite else start


Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(low=0)]
Share = Annotated[float, Range(low=0, high=1)]
ShareBetween = Annotated[float, Range(above=0, below=1)]
PositiveInt = Annotated[int, Range(low=1)]
NotNegativeInt = Annotated[int, Range(low=0)]
TwoOrMore = Annotated[int, Range(low=2)]


@dataclass(frozen=True, kw_only=True)
class Ranged:
    """Settings whose numbers are checked when they are made, from code or from a file."""

    def __post_init__(self) -> None:
        """Refuse a number out of the range in its field's type.

        Raises:
            ValueError: The message names the field, its value and the range.
        """
        for name, (allowed, is_optional) in _ranges_of(type(self)).items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                none = ", or null" if is_optional else ""
                raise ValueError(f"{name} is {value}; give a number: {allowed}{none}")


def _ranges_of(settings: type) -> dict[str, tuple[Range, bool]]:
    """Return the range of each field that has one, and whether it may be None."""
    hints = typing.get_type_hints(settings, include_extras=True)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(settings)}
    found = {name: _range_in(kind) for name, kind in fields.items()}
    return {
        name: (allowed, type(None) in typing.get_args(fields[name]))
        for name, allowed in found.items()
        if allowed is not None
    }


def _range_in(kind: Any) -> Range | None:
    """Return the range in a type such as Annotated[int, Range(low=1)] | None."""
    parts = [kind, *typing.get_args(kind)]
    ranges = [one for part in parts for one in getattr(part, "__metadata__", ())]
    return next((one for one in ranges if isinstance(one, Range)), None)
