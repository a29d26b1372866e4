"""Draw where each stage's inputs came from, and check that they are still the same."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from rlhf.runs.files import sha256_of
from rlhf.runs.folder import LINEAGE
from tools.report.charts import add, new_svg, shortened, to_markup, write
from tools.report.folders import RunFolder, Stage

BOX_WIDTH, BOX_HEIGHT = 156, 40
GAP_X, GAP_Y = 46, 18
MARGIN = 8
ARC_HEIGHT = 9
"""Height of a line over the boxes in between, for each column that it spans."""
HASH_DIGITS = 8


@dataclass(frozen=True)
class Input:
    """One input of one stage."""

    stage: str
    name: str
    """What the stage calls it: policy, prompts, reward.model."""
    path: str
    source: str
    """Name of the node that it comes from."""
    digest: str
    """First digits of the hash of its weights or rows."""
    is_changed: bool
    """Whether the folder that it came from was written again since."""


@dataclass(frozen=True)
class Node:
    """A stage's folder, or another place that inputs come from."""

    name: str
    detail: str
    column: int
    row: int

    @property
    def place(self) -> tuple[float, float]:
        """The upper left corner."""
        return (
            MARGIN + self.column * (BOX_WIDTH + GAP_X),
            MARGIN + self.row * (BOX_HEIGHT + GAP_Y),
        )


def find_inputs(run: RunFolder) -> list[Input]:
    """Return all inputs that the stages of a run recorded."""
    return [one for stage in run.stages for one in _inputs_of(stage, run)]


def _inputs_of(stage: Stage, run: RunFolder) -> Iterator[Input]:
    by_name = {one.name: one for one in run.stages}
    for name, described in (stage.lineage.get("inputs") or {}).items():
        path = str(described.get("path") or described.get("hub"))
        place = Path(path)
        parts = (place.name, place.parent.name)
        source = next((part for part in parts if part in by_name and part != stage.name), None)
        hashes = described.get("sha256") or {}
        digest = next(
            (one for file, one in hashes.items() if file.endswith((".safetensors", ".jsonl"))),
            next(iter(hashes.values()), ""),
        )
        recorded = described.get("lineage_sha256")
        current = by_name[source].folder / LINEAGE if source is not None else None
        is_changed = (
            recorded is not None
            and current is not None
            and current.is_file()
            and sha256_of(current) != recorded
        )
        yield Input(stage.name, name, path, source or place.name, digest[:HASH_DIGITS], is_changed)


def draw_lineage(run: RunFolder, inputs: Sequence[Input]) -> Markup:
    """Draw a box for each stage, left to right, with a line from where each input came from."""
    nodes = {node.name: node for node in _lay_out(run, inputs)}
    changed = {(one.source, one.stage) for one in inputs if one.is_changed}
    edges = sorted({(one.source, one.stage) for one in inputs})
    above = ARC_HEIGHT * max((nodes[b].column - nodes[a].column for a, b in edges), default=0)
    width = max(node.place[0] for node in nodes.values()) + BOX_WIDTH + MARGIN
    height = max(node.place[1] for node in nodes.values()) + BOX_HEIGHT + MARGIN
    text = "; ".join(f"{source} goes into {stage}" for source, stage in edges)
    svg = new_svg(width, height + above, f"Lineage: {text}")
    svg.set("viewBox", f"0 {-above} {width} {height + above}")
    svg.set("width", str(width))
    svg.set("height", str(height + above))
    for source, stage in edges:
        path = _path(nodes[source], nodes[stage])
        klass = "edge changed" if (source, stage) in changed else "edge"
        add(svg, "path", d=path, klass=klass)
    for node in nodes.values():
        x, y = node.place
        add(svg, "rect", x=x, y=y, width=BOX_WIDTH, height=BOX_HEIGHT, rx=6, klass="box")
        write(svg, x + BOX_WIDTH / 2, y + 17, shortened(node.name), "middle", "name")
        write(svg, x + BOX_WIDTH / 2, y + 32, node.detail, "middle")
    return to_markup(svg)


def _path(source: Node, target: Node) -> str:
    """Return a line between two boxes that passes beside the boxes in between."""
    (x1, y1), (x2, y2) = source.place, target.place
    span = target.column - source.column
    if span == 1 or source.row > 0:  # from side to side
        x1, y1, y2 = x1 + BOX_WIDTH, y1 + BOX_HEIGHT / 2, y2 + BOX_HEIGHT / 2
        bend = GAP_X * 0.6
        return f"M{x1},{y1}C{x1 + bend},{y1} {x2 - bend},{y2} {x2},{y2}"
    if target.row > 0:  # below: down first, then to the left side
        x1, y1, y2 = x1 + BOX_WIDTH * 0.75, y1 + BOX_HEIGHT, y2 + BOX_HEIGHT / 2
        return f"M{x1},{y1}C{x1},{y2} {x1 + GAP_X},{y2} {x1 + 2 * GAP_X},{y2}L{x2},{y2}"
    x1, x2, top = x1 + BOX_WIDTH * 0.6, x2 + BOX_WIDTH * 0.4, y1 - ARC_HEIGHT * span
    return f"M{x1},{y1}C{x1},{top} {x1 + GAP_X},{top} {x1 + 2 * GAP_X},{top}" + (
        f"L{x2 - 2 * GAP_X},{top}C{x2 - GAP_X},{top} {x2},{top} {x2},{y2}"
    )


def _lay_out(run: RunFolder, inputs: Sequence[Input]) -> Iterator[Node]:
    """Put each node one column to the right of the last of its inputs."""
    stages = {one.name: one for one in run.stages}
    sources = {one.source for one in inputs if one.source not in stages}
    names = [*sorted(sources), *stages]
    columns = dict.fromkeys(names, 0)
    for _ in names:  # no chain of inputs is longer than this
        for one in inputs:
            if one.source != one.stage:
                columns[one.stage] = max(columns[one.stage], columns[one.source] + 1)
    columns = {name: min(column, len(names)) for name, column in columns.items()}
    taken: dict[int, int] = {}
    for name in names:
        column = columns[name]
        row = taken.get(column, 0)
        taken[column] = row + 1
        stage = stages.get(name)
        yield Node(name, "input" if stage is None else stage.stage, column, row)
