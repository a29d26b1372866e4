"""Read rows from JSON Lines, a JSON list, plain text cut into documents, or the hub."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf.inputs.files import FILE_ENDINGS, HUB, decode, list_files, open_file, read_rows
from rlhf.inputs.records import RecordError

JSON_ENDINGS = (".json", ".json.gz")
TEXT_ENDINGS = (".txt", ".txt.gz")

_BLANK_LINES = re.compile(r"\n\s*\n")
_GUTENBERG_START = re.compile(
    r"\*\*\* ?START OF TH(?:IS|E) PROJECT GUTENBERG EBOOK.*\n(?:\s*Produced by (?:.+\n)+)?"
)
_GUTENBERG_END = re.compile(
    r"(?:End of (?:the )?Project Gutenberg(?:.+\n){1,3}\s*)?"
    r"\*\*\* ?END OF TH(?:IS|E) PROJECT GUTENBERG EBOOK"
)


def read_source(source: str) -> Iterator[tuple[str, Any]]:
    """Yield (place, row) from a .jsonl or .json file (or .gz), a folder of them, or a hub id.

    Raises:
        ValueError: a row is not UTF-8 or not JSON; the message names its place.
    """
    if source.startswith(HUB):
        yield from _checked(read_rows(source))
        return
    for path in list_files(Path(source), FILE_ENDINGS + JSON_ENDINGS):
        yield from (
            _read_list(path) if path.name.endswith(JSON_ENDINGS) else _checked(read_rows(path))
        )


def read_texts(source: str, max_characters: int) -> Iterator[tuple[str, Any]]:
    """Yield (place, {"text"}) for each document of .txt files, or of rows with a `text` field."""
    if not source.startswith(HUB) and _holds_text_files(Path(source)):
        for path in list_files(Path(source), TEXT_ENDINGS):
            yield from _documents(str(path), _decode_file(path), max_characters)
        return
    for place, row in read_source(source):
        if isinstance(row, dict) and isinstance(row.get("text"), str) and row["text"].strip():
            yield from _documents(place, row["text"], max_characters)
        else:
            yield place, row


def strip_gutenberg(text: str) -> str:
    """Remove Project Gutenberg's header and licence from a book; return other text unchanged."""
    start, end = _GUTENBERG_START.search(text), _GUTENBERG_END.search(text)
    return text[start.end() if start else 0 : end.start() if end else len(text)]


def split_documents(text: str, max_characters: int) -> list[str]:
    """Join neighbouring paragraphs as long as they fit into max_characters.

    A longer paragraph is cut at white space. Nothing but white space is lost.
    """
    documents: list[str] = []
    for paragraph in _BLANK_LINES.split(text.strip()):
        for piece in _cut(paragraph.strip(), max_characters):
            # 2 characters are for the blank line between paragraphs.
            if documents and len(documents[-1]) + 2 + len(piece) <= max_characters:
                documents[-1] += "\n\n" + piece
            else:
                documents.append(piece)
    return documents


def _cut(paragraph: str, max_characters: int) -> Iterator[str]:
    while len(paragraph) > max_characters:
        head = paragraph[: max_characters + 1]
        end = max(head.rfind(" "), head.rfind("\n"))
        end = end if end > 0 else max_characters
        yield paragraph[:end].rstrip()
        paragraph = paragraph[end:].lstrip()
    if paragraph:
        yield paragraph


def _documents(place: str, text: str, max_characters: int) -> Iterator[tuple[str, Any]]:
    text = strip_gutenberg(text.replace("\r\n", "\n"))
    for number, document in enumerate(split_documents(text, max_characters), start=1):
        yield f"{place}, document {number}", {"text": document}


def _holds_text_files(source: Path) -> bool:
    names = [path.name for path in source.iterdir()] if source.is_dir() else [source.name]
    return any(name.endswith(TEXT_ENDINGS) for name in names)


def _read_list(path: Path) -> Iterator[tuple[str, Any]]:
    """Read a JSON list, or JSON Lines, which some data sets also name .json."""
    text = _decode_file(path)
    try:
        values = json.loads(text)
        rows = list(enumerate(values if isinstance(values, list) else [values], start=1))
    except (ValueError, RecursionError):
        rows = _parse_lines(path, text)
    for number, row in rows:
        yield f"{path}, row {number}", row


def _parse_lines(path: Path, text: str) -> list[tuple[int, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append((number, json.loads(line)))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path} is neither a JSON list nor JSON Lines (line {number}: {error})"
            ) from None
    return rows


def _decode_file(path: Path) -> str:
    try:
        with open_file(path) as file:
            return decode(file.read())
    except RecordError as error:
        raise ValueError(f"{path}: {error}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a complete gzip file: {error}") from None


def _checked(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    for place, row in rows:
        if isinstance(row, RecordError):
            raise ValueError(f"{place}: {row}")
        yield place, row
