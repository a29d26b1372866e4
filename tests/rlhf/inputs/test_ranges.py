"""Numbers must be in the range of their field's type, in settings from code and from a file."""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import pytest

from rlhf.inputs.ranges import Positive, PositiveInt, Range, Ranged, Share, ShareBetween
from rlhf.runs.settings import load_config


@dataclass(frozen=True, kw_only=True)
class Section(Ranged):
    """A section."""

    rate: Positive = 1.0
    """A rate."""


@dataclass(frozen=True, kw_only=True)
class Settings(Ranged):
    """Settings with a number of each kind."""

    count: PositiveInt = 1
    """A count."""
    share: Share = 0.5
    """A share."""
    held_out: ShareBetween | None = None
    """A share, or null."""
    norm: Annotated[float, Range(above=0, may_be_infinite=True)] = 1.0
    """A limit, or none."""
    section: Section = Section()
    """A section."""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count is 0; give a number: 1 or more"),
        ({"share": -0.1}, "share is -0.1; give a number: 0 to 1"),
        ({"share": math.nan}, "share is nan; give a number: 0 to 1"),
        ({"held_out": 1.0}, "held_out is 1.0; give a number: above 0, below 1, or null"),
        ({"norm": 0.0}, "norm is 0.0; give a number: above 0, .inf for no limit"),
    ],
)
def test_numbers_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as refusal:
        Settings(**changes)
    assert str(refusal.value) == message


def test_the_ends_of_a_range_belong_to_it_or_not() -> None:
    Settings(count=1, share=1.0, held_out=None, norm=math.inf)
    for rate in (0.0, math.inf):
        with pytest.raises(ValueError, match="rate is"):
            Section(rate=rate)


def test_the_whole_key_is_named_and_help_shows_the_range(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(ValueError, match=r"^section\.rate is 0\.0; give a number: above 0$"):
        load_config(Settings, ["--section.rate", "0"])
    with pytest.raises(SystemExit):
        load_config(Settings, ["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(type: int, 1 or more, default: 1)" in shown
    assert "(type: float | null, above 0, below 1, default: null)" in shown
