"""Reads records from disk and the hub, writes them, and splits them by prompt."""

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from rlhf.inputs.records import RecordError, RecordT
from rlhf.inputs.whole_files import written_whole

HUB = "hub:"
FILE_ENDINGS = (".jsonl", ".jsonl.gz")
NUM_SHOWN_ERRORS = 5
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class NoRecordsError(ValueError):
    """Says that there was nothing to write."""


def read_records(
    source: str | Path, record_class: type[RecordT], *, limit: int | None = None
) -> list[RecordT]:
    """Read and check the records of one kind.

    Args:
        source: A .jsonl or .jsonl.gz file, a folder of those, `hub:owner/name[:split[:subset]]`
            (default split `train`) or `hub:owner/name:path/in/repository.jsonl.gz`.
        record_class: Demonstration, Ranking, Prompt or Text.
        limit: Maximum number of rows to read; None means all.

    Raises:
        ValueError: There are bad rows, or no rows. The message names the first five bad rows by
            file, row, field, found, expected and remedy.
        OSError: The source cannot be opened.
    """
    records: list[RecordT] = []
    errors: list[str] = []
    num_bad = 0
    for place, row in islice(read_rows(source), limit):
        try:
            if isinstance(row, RecordError):
                raise row
            records.append(record_class.from_row(row, place))
        except RecordError as error:
            num_bad += 1
            if num_bad <= NUM_SHOWN_ERRORS:
                errors.append(f"{place}: {error}")
    if num_bad:
        more = "" if num_bad <= NUM_SHOWN_ERRORS else f"\n(and {num_bad - NUM_SHOWN_ERRORS} more)"
        lines = "\n".join(errors)
        raise ValueError(
            f"{source}: {num_bad} of {num_bad + len(records)} rows do not hold a "
            f"{record_class.kind}:\n{lines}{more}"
        )
    if not records:
        raise ValueError(f"{source} is empty: expected at least one {record_class.kind} row")
    return records


def read_rows(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (place, value) for every row of a source; place names file and row.

    A row that is not UTF-8 or not JSON is yielded as a RecordError that says so, so that the caller
    can go on and count.
    """
    if str(source).startswith(HUB):
        yield from _read_hub(str(source))
        return
    for path in list_files(Path(source), FILE_ENDINGS):
        yield from _read_lines(path)


def list_files(source: Path, endings: tuple[str, ...]) -> list[Path]:
    """Return the file itself, or a folder's files with one of the endings, sorted by name.

    Raises ValueError if there is none, FileNotFoundError if the source does not exist.
    """
    if source.is_dir():
        paths = sorted(p for p in source.iterdir() if p.name.endswith(endings))
        if not paths:
            raise ValueError(f"no {' or '.join(endings)} file in the folder {source}")
        return paths
    if not source.exists():
        raise FileNotFoundError(
            f"{source} does not exist (a data set of the hub is written {HUB}owner/name)"
        )
    if not source.name.endswith(endings):
        raise ValueError(f"{source}: expected a file ending in {' or '.join(endings)}, or a folder")
    return [source]


def open_file(path: Path) -> IO[bytes]:
    """Open a file to read bytes; unpack it if its name ends in .gz."""
    return gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb")  # type: ignore[return-value]


def decode(data: bytes) -> str:
    """Decode UTF-8 bytes. Raises RecordError that names the first byte that is not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError(
            "row",
            found=f"byte 0x{data[error.start]:02x} at byte {error.start + 1}, which is not UTF-8",
            expected="UTF-8 text",
            remedy="save it as UTF-8, e.g. `iconv -f latin1 -t utf-8`",
        ) from None


def write_records(path: str | Path, records: Iterable[RecordT]) -> None:
    """Write records as JSON Lines, gzipped if the name ends in .gz.

    They go into a temporary file, which is renamed once all are written. So an interrupted run
    leaves the old file. Raises NoRecordsError if there are no records.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        with file.open("wb") as raw:
            if path.name.endswith(".gz"):
                # No time and no name in the header, so that equal records give equal bytes.
                with gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed:
                    num_written = _write_lines(packed, records)
            else:
                num_written = _write_lines(raw, records)
        if not num_written:
            raise NoRecordsError(f"no records to write to {path}")


def split_by_prompt(
    records: Sequence[RecordT], held_out: float, seed: int, *, salt: str = ""
) -> tuple[list[RecordT], list[RecordT]]:
    """Split records into (train, held out). All records of one prompt go to the same side.

    A prompt is held out if the hash of (salt, seed, prompt) is below `held_out` (a share, 0 to 1).
    So it is on the same side in every file, even after records are added. The share is only met on
    average. Give a salt if a stage will split the written files again. Without it, the prompts that
    the stage would hold out are already gone.
    Raises ValueError if a side would be empty.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out is {held_out}: expected a share between 0 and 1, such as 0.1")
    sides: tuple[list[RecordT], list[RecordT]] = ([], [])
    for record in records:
        sides[_hash_share(f"{salt}{seed}\n{record.key}") < held_out].append(record)
    train, test = sides
    if not train or not test:
        raise ValueError(
            f"held_out={held_out} with seed={seed} leaves {len(train)} records to train on and "
            f"{len(test)} held out: change the share or the seed, or add prompts"
        )
    return train, test


def _hash_share(text: str) -> float:
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _write_lines(file: IO[bytes] | gzip.GzipFile, records: Iterable[RecordT]) -> int:
    count = 0
    for record in records:
        file.write(json.dumps(record.to_row(), ensure_ascii=False).encode() + b"\n")
        count += 1
    return count


def _read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open_file(path) as file:
        lines = enumerate(file, start=1)
        while True:
            try:
                number, line = next(lines)
            except StopIteration:
                return
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(f"{path} is not a complete gzip file: {error}") from None
            if line.strip():
                yield f"{path}, row {number}", _parse(line)


def _parse(line: bytes) -> Any:
    try:
        return json.loads(decode(line))
    except RecordError as error:
        return error
    except (ValueError, RecursionError) as error:
        return RecordError(
            "row",
            found=f"{line[:60].decode(errors='replace').rstrip()!r} ({error})",
            expected="one JSON object a line",
            remedy="fix the line, or convert the file with `python -m data.convert`",
        )


def _read_hub(source: str) -> Iterator[tuple[str, Any]]:
    name, _, rest = source.removeprefix(HUB).partition(":")
    if _HUB_NAME.fullmatch(name) is None or ".." in rest.split("/"):
        raise ValueError(f"{source}: expected {HUB}owner/name[:split[:subset]]")
    if rest.endswith(FILE_ENDINGS):
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(name, rest, repo_type="dataset")
        yield from _read_lines(Path(path))
        return
    from datasets import load_dataset

    split, _, subset = rest.partition(":")
    rows = load_dataset(name, subset or None, split=split or "train")
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row
