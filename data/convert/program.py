"""Run a conversion: read rows, convert and count them, write the whole file or nothing."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data.convert.formats import (
    CONVERTERS,
    Changed,
    Converter,
    Dropped,
    LayoutError,
    columns_demonstrations,
    columns_prompts,
)
from data.convert.readers import read_source, read_texts
from rlhf.inputs.files import FILE_ENDINGS, NoRecordsError, write_records
from rlhf.inputs.ranges import PositiveInt, Ranged
from rlhf.inputs.records import Record, RecordError
from rlhf.runs.folder import locked_file


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Ranged):
    """Turn a public data set into this project's records."""

    format: Literal[
        "hh",
        "tldr",
        "ultrafeedback",
        "oasst",
        "kwise",
        "alpaca",
        "dolly",
        "self_instruct",
        "gsm8k",
        "p3",
        "messages",
        "sharegpt",
        "preference",
        "prompt_completion",
        "columns",
        "strings",
        "ifeval",
        "mt_bench",
        "text",
    ]
    """Layout of the input."""
    input: str
    """A file (.jsonl, .jsonl.gz, .json, .json.gz; for text also .txt, .txt.gz), a folder of those,
    `hub:owner/name[:split[:subset]]`, or `hub:owner/name:file/in/the/repository.jsonl.gz`."""
    output: str
    """The .jsonl or .jsonl.gz file to write. It appears only when all of it is written. An existing
    file is replaced only with overwrite."""
    overwrite: bool = False
    """Replace the file that output names."""
    kind: Literal["demonstration", "ranking", "prompt", "text"] | None = None
    """Kind of record to make. None means the first that the layout offers."""
    limit: PositiveInt | None = None
    """Rows to read (with format text, documents). None means all."""
    prompt_column: str = "prompt"
    """Field that holds the prompt. Used with format columns only."""
    response_column: str = "response"
    """Field that holds the response. Used with format columns only."""
    max_characters: PositiveInt = 2000
    """Longest document, in characters. Longer ones are cut, between paragraphs if possible. Used
    with format text only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = CONVERTERS[self.format]
        if self.kind is not None and self.kind not in kinds:
            raise ValueError(
                f"format {self.format} has no kind {self.kind}; give one of {', '.join(kinds)}"
            )
        if not self.output.endswith(FILE_ENDINGS):
            raise ValueError(f"output is {self.output!r}; give a name in .jsonl or .jsonl.gz")
        if Path(self.output).resolve() == Path(self.input).resolve():
            raise ValueError(f"input and output are both {self.input!r}; give another output")
        for name in ("prompt_column", "response_column"):
            default = type(self).__dataclass_fields__[name].default
            if self.format != "columns" and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r} and format is {self.format}; only format "
                    "columns reads it"
                )


@dataclass(kw_only=True)
class Counts:
    """Counts rows and records; `dropped` and `changed` count by reason."""

    num_read: int = 0
    num_written: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    changed: Counter[str] = field(default_factory=Counter)

    def report(self) -> str:
        """Return the counts as lines to print."""
        lines = [
            f"rows read {self.num_read}, records written {self.num_written}, "
            f"dropped {self.dropped.total()}, changed {self.changed.total()}"
        ]
        lines += [f"  dropped {n}: {reason}" for reason, n in self.dropped.most_common()]
        lines += [f"  changed {n}: {reason}" for reason, n in self.changed.most_common()]
        return "\n".join(lines)


def convert(config: ConvertConfig) -> Counts:
    """Run one conversion.

    Raises:
        ValueError: a row has another layout, no row gives a record, or another process is writing
            the output. Then nothing is written.
    """
    with locked_file(config.output):
        return _convert(config)


def _convert(config: ConvertConfig) -> Counts:
    _refuse_to_replace(config)
    kind: str = config.kind or next(iter(CONVERTERS[config.format].keys()))
    print(f"{config.format}: {config.input} -> {config.output} ({kind})")
    if config.format == "text":
        rows = read_texts(config.input, config.max_characters)
    else:
        rows = read_source(config.input)
    counts = Counts()
    records = convert_rows(islice(rows, config.limit), _converter(config, kind), counts)
    try:
        write_records(config.output, records)
    except LayoutError as error:
        raise ValueError(f"{error}; is --format {config.format} the right layout?") from None
    except NoRecordsError:
        if counts.num_read == 0:
            raise ValueError(f"{config.input} is empty: no rows to convert") from None
        raise ValueError(f"{config.input} gives no {kind}: {counts.report()}") from None
    print(counts.report())
    return counts


def _refuse_to_replace(config: ConvertConfig) -> None:
    """Raise a ValueError if the output exists, unless it may be replaced and is no input."""
    output, source = Path(config.output), Path(config.input)
    if not output.exists():
        return
    if source.exists() and source.resolve() in (output.resolve(), output.resolve().parent):
        raise ValueError(
            f"output {output} is there and is read from input {source}; give another output"
        )
    if output.is_dir() or not config.overwrite:
        raise ValueError(
            f"output {output} is there already; give another output, or --overwrite to replace it"
        )


def _converter(config: ConvertConfig, kind: str) -> Converter:
    if config.format != "columns":
        return CONVERTERS[config.format][kind]
    return partial(
        columns_demonstrations if kind == "demonstration" else columns_prompts,
        prompt_column=config.prompt_column,
        response_column=config.response_column,
    )


def convert_rows(
    rows: Iterator[tuple[str, Any]], converter: Converter, counts: Counts
) -> Iterator[Record]:
    """Yield the records of (place, row) pairs, and count every row in `counts`.

    Raises:
        LayoutError: a row has another layout; the message names its place.
    """
    for place, row in rows:
        counts.num_read += 1
        try:
            for item in converter(row):
                if isinstance(item, Dropped):
                    counts.dropped[item.reason] += 1
                elif isinstance(item, Changed):
                    counts.changed[item.reason] += 1
                else:
                    counts.num_written += 1
                    yield item
        except LayoutError as error:
            raise LayoutError(f"{place}: {error}") from None
        except RecordError as error:
            raise ValueError(f"{place}: {error}") from None
