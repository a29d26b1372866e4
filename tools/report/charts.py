"""Draw the charts of a page as SVG.

The elements carry classes and no colours: the style sheet of the page colours them for light and
dark, and for print. Matplotlib would fix the colours, make larger pages, and take a second to
import at every checkpoint.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup

from tools.report.figures import Figure
from tools.report.panels import Curve, DrawnPanel, thin_out

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 10, 24
NUM_COLOURS = 6
"""Colours that the style sheet has; further lines start again from the first."""
MAX_LABEL = 22
"""Most characters of a label in a drawing."""
NUMBER_WIDTH = 58
"""Width of the numbers at the right of a chart of intervals."""
ROW_HEIGHT = 30
"""Height of one row of a chart of intervals."""


@dataclass(frozen=True)
class Scale:
    """Maps values to places on an axis."""

    low: float
    high: float
    start: float
    """Place of `low`."""
    end: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, most: int) -> list[float]:
        """Return round values between the ends, with at most `most` steps between them."""
        step = _round_step((self.high - self.low) / most)
        # 1e-9 keeps a value at an end in spite of rounding.
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [number * step for number in range(first, last + 1)]


def scale_for(values: Iterable[float], start: float, end: float, margin: float = 0.06) -> Scale:
    """Return a scale with some room at both ends."""
    found = [value for value in values if math.isfinite(value)]
    low, high = min(found), max(found)
    room = (high - low) * margin if high > low else abs(high) * 0.1 or 1.0
    return Scale(low - room, high + room, start, end)


@dataclass(frozen=True)
class Dot:
    """One point of a scatter chart."""

    label: str
    x: float
    y: float
    rank: int
    """Number of the colour."""
    error: tuple[float, float] | None = None
    """95 % interval of y."""


@dataclass(frozen=True)
class IntervalRow:
    """One row of a chart of intervals."""

    label: str
    figure: Figure
    interval: tuple[float, float] | None
    rank: int

    @property
    def value(self) -> float:
        return self.figure.value


def draw_panel(drawn: DrawnPanel, name: str) -> Markup:
    """Draw the curves of a panel, with the healthy range, limits and alarms.

    Args:
        name: Identifier of the chart, by which the script of the page finds its data.
    """
    panel, curves = drawn.panel, drawn.curves
    values = [value for curve in curves for value in curve.values]
    values = [value for value in values if panel.floor is None or value >= panel.floor] or values
    if panel.healthy is not None and len(set(values)) == 1:
        values = [*values, *panel.healthy]  # a flat line says more within its healthy range
    y = scale_for(values, HEIGHT - BOTTOM, TOP)
    steps = [step for curve in curves for step in curve.steps]
    x = scale_for(steps, LEFT, WIDTH - RIGHT, margin=0.0 if len(set(steps)) > 1 else 0.5)
    svg = new_svg(WIDTH, HEIGHT, _describe_panel(drawn), name)
    if panel.healthy is not None:
        low, high = (min(max(end, y.low), y.high) for end in panel.healthy)
        height = y(low) - y(high)
        add(svg, "rect", x=LEFT, y=y(high), width=WIDTH - LEFT - RIGHT, height=height, klass="band")
    _axes(svg, x, y)
    for limit in drawn.limits:
        if y.low <= limit <= y.high:
            add(svg, "line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(limit), y2=y(limit), klass="limit")
    for alarm in drawn.alarms:
        for pixel in dict.fromkeys(round(x(step)) for step in alarm.steps):
            add(svg, "path", d=_triangle(pixel, TOP), klass="alarm")
        if alarm.steps:
            place = x(alarm.steps[0])
            add(svg, "line", x1=place, x2=place, y1=TOP, y2=HEIGHT - BOTTOM, klass="alarm-line")
    for curve in curves:
        _draw_curve(svg, curve, x, y)
    add(svg, "line", x1=0, x2=0, y1=TOP, y2=HEIGHT - BOTTOM, klass="cursor")
    return to_markup(svg)


def draw_intervals(
    rows: Sequence[IntervalRow],
    title: str,
    reference: float | None = None,
    *,
    has_bars: bool = False,
) -> Markup:
    """Draw values with their intervals, one below the other, with the numbers at the right.

    Args:
        title: What is shown, for screen readers.
        reference: A value to compare with, such as that of chance.
        has_bars: Whether a bar leads from the reference to each value, as for counts.
    """
    height = TOP + ROW_HEIGHT * len(rows) + BOTTOM
    ends = [end for row in rows for end in (row.interval or ())]
    values = [row.value for row in rows] + ends + ([] if reference is None else [reference])
    labels = [shortened(row.label) for row in rows]
    left, right = 14 + 7 * max(map(len, labels)), WIDTH - NUMBER_WIDTH
    x = scale_for(values, left, right)
    svg = new_svg(WIDTH, height, _describe_values(title, ((row.label, row.value) for row in rows)))
    for tick in x.ticks(4):
        add(svg, "line", x1=x(tick), x2=x(tick), y1=TOP, y2=height - BOTTOM, klass="grid")
        write(svg, x(tick), height - 8, _number(tick), "middle")
    if reference is not None:
        place = x(reference)
        add(svg, "line", x1=place, x2=place, y1=TOP, y2=height - BOTTOM, klass="limit")
    for number, row in enumerate(rows):
        y = TOP + ROW_HEIGHT * (number + 0.5)
        colour = f"c{row.rank % NUM_COLOURS}"
        write(svg, left - 10, y + 4, labels[number], "end", "name")
        drawn = row.interval
        if has_bars and reference is not None:
            drawn = (reference, row.value)
        if drawn is not None:
            low, high = drawn
            add(svg, "line", x1=x(low), x2=x(high), y1=y, y2=y, klass=f"whisker {colour}")
        add(svg, "circle", cx=x(row.value), cy=y, r=5, klass=f"dot {colour}")
        figure_text = write(svg, WIDTH - 2, y + 4, str(row.figure), "end", "name")
        figure_text.set("data-value", repr(row.figure.value))
        figure_text.set("data-origin", row.figure.origin)
    return to_markup(svg)


def draw_scatter(dots: Sequence[Dot], path: Sequence[Dot], title: str, x_label: str) -> Markup:
    """Draw points with their labels, and a path of points that belong together.

    Args:
        path: Points joined by a line, such as best-of-n for growing n.
    """
    points = [*dots, *path]
    ends = [end for dot in points for end in (dot.error or ())]
    x = scale_for([dot.x for dot in points], LEFT, WIDTH - RIGHT - 30, margin=0.1)
    y = scale_for([*(dot.y for dot in points), *ends], HEIGHT + 30 - BOTTOM - 12, TOP, margin=0.12)
    svg = new_svg(
        WIDTH, HEIGHT + 30, _describe_values(title, ((dot.label, dot.y) for dot in points))
    )
    _axes(svg, x, y, HEIGHT + 30 - 12)
    write(svg, (LEFT + WIDTH - RIGHT) / 2, HEIGHT + 26, x_label, "middle")
    if len(path) > 1:
        line = " ".join(f"{x(dot.x)},{y(dot.y)}" for dot in path)
        add(svg, "polyline", points=line, klass=f"curve c{path[0].rank % NUM_COLOURS} dashed")
    taken: list[tuple[float, float]] = []
    for dot in points:
        colour = f"c{dot.rank % NUM_COLOURS}"
        if dot.error is not None:
            low, high = dot.error
            add(
                svg, "line", x1=x(dot.x), x2=x(dot.x), y1=y(low), y2=y(high), klass=f"thin {colour}"
            )
        add(svg, "circle", cx=x(dot.x), cy=y(dot.y), r=4, klass=f"dot {colour}")
        place = _free_place(x(dot.x) + 7, y(dot.y) + 4, taken)
        taken.append(place)
        write(svg, *place, shortened(dot.label), "start", "name")
    return to_markup(svg)


def draw_calibration(bins: Sequence[tuple[float, float, int]]) -> Markup:
    """Draw a reliability diagram: how often the reward model is right, by how sure it is.

    Args:
        bins: Mean confidence, accuracy and number of pairs of each bin.
    """
    x = Scale(0.5, 1.0, LEFT, WIDTH - RIGHT)
    y = Scale(min(0.45, *(accuracy for _, accuracy, _ in bins)), 1.0, HEIGHT + 12 - BOTTOM, TOP)
    values = ((f"sure by {sure:.2f}", right) for sure, right, _ in bins)
    svg = new_svg(
        WIDTH, HEIGHT + 30, _describe_values("How often the reward model is right", values)
    )
    _axes(svg, x, y, HEIGHT + 12)
    write(
        svg,
        (LEFT + WIDTH - RIGHT) / 2,
        HEIGHT + 26,
        "how sure it is (upwards: how often it is right)",
        "middle",
    )
    add(svg, "line", x1=x(0.5), y1=y(0.5), x2=x(1.0), y2=y(1.0), klass="limit")
    line = " ".join(f"{x(sure)},{y(right)}" for sure, right, _ in bins)
    add(svg, "polyline", points=line, klass="curve c0")
    most = max(pairs for _, _, pairs in bins)
    for sure, right, pairs in bins:
        radius = round(2 + 5 * math.sqrt(pairs / most), 2)
        add(svg, "circle", cx=x(sure), cy=y(right), r=radius, klass="dot c0")
    return to_markup(svg)


def _draw_curve(svg: ElementTree.Element, curve: Curve, x: Scale, y: Scale) -> None:
    dashes = " second" if curve.run % 2 else ""
    colour = f"c{curve.rank % NUM_COLOURS}{dashes}"
    if curve.is_held_out:
        _polyline(svg, curve.steps, curve.values, x, y, f"curve held-out {colour}")
        for step, value in ((curve.steps[place], curve.values[place]) for place in curve.kept):
            if y.low <= value <= y.high:
                add(svg, "circle", cx=x(step), cy=y(value), r=2.6, klass=f"dot {colour}")
        return
    smooth = curve.smooth
    if smooth is not None:
        _polyline(svg, curve.steps, curve.values, x, y, f"curve raw {colour}")
    _polyline(svg, curve.steps, smooth or curve.values, x, y, f"curve {colour}")


def _polyline(
    svg: ElementTree.Element,
    steps: Sequence[float],
    values: Sequence[float],
    x: Scale,
    y: Scale,
    klass: str,
) -> None:
    kept = [(steps[place], min(max(values[place], y.low), y.high)) for place in thin_out(values)]
    points = " ".join(f"{x(step)},{y(value)}" for step, value in kept)
    add(svg, "polyline", points=points, klass=klass)


def _axes(svg: ElementTree.Element, x: Scale, y: Scale, bottom: float = HEIGHT) -> None:
    for tick in y.ticks(5):
        add(svg, "line", x1=LEFT, x2=WIDTH - RIGHT, y1=y(tick), y2=y(tick), klass="grid")
        write(svg, LEFT - 6, y(tick) + 4, _number(tick), "end")
    for tick in x.ticks(5):
        write(svg, x(tick), bottom - 8, _number(tick), "middle")


def new_svg(
    width: float, height: float, title: str, name: str | None = None
) -> ElementTree.Element:
    """Return an empty drawing; screen readers read its title out."""
    svg = ElementTree.Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img"})
    svg.set("aria-label", title)
    if name is not None:
        svg.set("data-chart", name)
        svg.set("tabindex", "0")
    return svg


def add(parent: ElementTree.Element, tag: str, **attributes: object) -> ElementTree.Element:
    """Add an element. `klass` is its class, and `_` in a name stands for `-`."""
    named = {
        ("class" if name == "klass" else name.replace("_", "-")): str(value)
        for name, value in attributes.items()
    }
    return ElementTree.SubElement(parent, tag, named)


def write(
    parent: ElementTree.Element, x: float, y: float, content: str, anchor: str, klass: str = "tick"
) -> ElementTree.Element:
    """Add a text; anchor is start, middle or end."""
    made = add(parent, "text", x=round(x, 2), y=round(y, 2), text_anchor=anchor, klass=klass)
    made.text = content
    return made


def shortened(label: str) -> str:
    """Cut the start off a label that is longer than MAX_LABEL, since its end says most."""
    return label if len(label) <= MAX_LABEL else f"…{label[1 - MAX_LABEL :]}"


def to_markup(svg: ElementTree.Element) -> Markup:
    """Return a drawing as HTML."""
    return Markup(ElementTree.tostring(svg, encoding="unicode", short_empty_elements=False))


def _triangle(x: float, y: float) -> str:
    return f"M{x - 4},{y - 7}h8l-4,7z"


def _free_place(x: float, y: float, taken: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Return the place of a label, moved down while another label is in its way."""
    # A short name is about 60 wide, and a line of text is 12 high.
    while any(abs(x - other) < 60 and abs(y - beside) < 12 for other, beside in taken):
        y += 12
    return x, y


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2, 2.5 and 5 times a power of ten that is not below this."""
    power = 10.0 ** math.floor(math.log10(least))
    # 0.999 lets a step through that rounding put just below.
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= least * 0.999)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value / 1000:.4g}k"


def _describe_panel(drawn: DrawnPanel) -> str:
    ends = ", ".join(
        f"{curve.label} from {curve.values[0]:.3g} to {curve.values[-1]:.3g}"
        for curve in drawn.curves
    )
    what = ", ".join(filter(None, (drawn.panel.title, drawn.panel.unit)))
    return f"{drawn.panel.group}: {what}: {ends}"


def _describe_values(title: str, values: Iterable[tuple[str, float]]) -> str:
    return f"{title}: " + ", ".join(f"{label} {value:.3g}" for label, value in values)
