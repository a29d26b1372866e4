"""Check a record file, and show one row as the stages read it.

    python -m data.check FILE [--tokenizer FOLDER]

Each bad row gets a message, and bad rows stop the program. Rows that are allowed but rarely meant
get a warning: duplicate prompts, empty responses, rankings where all responses are tied. One
example is shown as the stages render it, with the trained tokens marked.
"""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from itertools import islice
from math import comb
from statistics import fmean, median
from typing import TYPE_CHECKING, Literal
from warnings import catch_warnings, simplefilter

from rlhf.inputs.files import read_records, read_rows
from rlhf.inputs.records import (
    RECORD_CLASSES,
    Demonstration,
    Prompt,
    PromptLike,
    Ranking,
    Record,
    RecordError,
    Text,
    name_rows,
    naming_row,
    to_messages,
    with_equal_responses,
)
from rlhf.runs.program import run_stage

if TYPE_CHECKING:
    from rlhf.inputs.chat import Chat

_GREEN, _PLAIN = "\033[32m", "\033[0m"


@dataclass(frozen=True, kw_only=True)
class CheckConfig:
    """Validate a file of records, count what is in it, and show one row as it is trained on."""

    file: str
    """A .jsonl or .jsonl.gz file, a folder of those, or `hub:owner/name[:split[:subset]]`."""
    kind: Literal["demonstration", "ranking", "prompt", "text"] | None = None
    """Kind of record. None means the kind that the fields of the first row suggest."""
    tokenizer: str | None = None
    """Model folder or hub id. Its tokenizer counts tokens, and its chat template renders the
    example. None means that lengths are in characters and the example is plain text."""
    example: int = 1
    """Row to show, counted from 1."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Holds a stretch of a rendered example."""

    text: str
    trained: bool


def check(config: CheckConfig) -> None:
    """Print the report; raise a ValueError for bad rows, or if no ranking has an order."""
    kind = config.kind or detect_kind(config.file)
    records: list[Record] = list(read_records(config.file, RECORD_CLASSES[kind]))
    if not 1 <= config.example <= len(records):
        raise ValueError(f"example is {config.example}; the file has rows 1 to {len(records)}")
    with catch_warnings(record=True) as caught:
        simplefilter("always", UserWarning)
        chat = _load_chat(config.tokenizer) if config.tokenizer else None
        figures = list(statistics(records, chat))
    of_rendering = dict.fromkeys(
        str(one.message) for one in caught if issubclass(one.category, UserWarning)
    )
    print(f"{config.file}: {len(records)} {kind} rows, all valid")
    for line in figures:
        print(f"  {line}")
    for line in [*warnings(records, chat), *of_rendering]:
        print(f"  warning: {line}")
    _refuse_orderless(config.file, records, chat)
    colour = sys.stdout.isatty()
    print(f"\nRow {config.example} as rendered; {_legend(kind, colour)}:")
    print(mark(render(records[config.example - 1], chat), colour=colour))
    if chat is None:
        print("\n(plain text; --tokenizer FOLDER shows the chat template and counts tokens)")


def detect_kind(source: str) -> str:
    """Return the kind whose fields the first row has.

    A misspelt field counts as the nearest known one.
    """
    known = {
        field.name: kind
        for kind, cls in RECORD_CLASSES.items()
        for field in fields(cls)
        if field.name != "place"
    }
    for _, row in islice(read_rows(source), 1):
        if isinstance(row, RecordError) or not isinstance(row, dict):
            break
        names = {match for key in row for match in get_close_matches(key, known, n=1)}
        if names & {"responses", "ranks", "probabilities"}:
            return Ranking.kind
        if "response" in names:
            return Demonstration.kind
        return Text.kind if "text" in names and "prompt" not in names else Prompt.kind
    return Prompt.kind


def statistics(records: Sequence[Record], chat: "Chat | None") -> Iterator[str]:
    """Yield lines of figures: turns and lengths; for rankings also K, ties and how often the longer
    response wins."""
    if prompted := [record for record in records if not isinstance(record, Text)]:
        turns = Counter(len(to_messages(record.prompt)) for record in prompted)
        yield f"distinct prompts {len({record.key for record in records})}"
        yield f"turns in a prompt: {_histogram(turns)}"
        yield _lengths("prompt", [_prompt_length(record, chat) for record in prompted], chat)
    if lengths := [length for record in records for length in _trained_lengths(record, chat)]:
        name = "text" if isinstance(records[0], Text) else "response"
        yield _lengths(name, lengths, chat)
    if rankings := [record for record in records if isinstance(record, Ranking)]:
        yield from _ranking_statistics(rankings)


def warnings(records: Sequence[Record], chat: "Chat | None" = None) -> Iterator[str]:
    """Yield warnings about rows that are valid but rarely meant.

    Responses are equal if their token ids are; without a tokenizer, if their texts are.
    """
    keys = Counter(record.key for record in records)
    if duplicates := sum(count - 1 for count in keys.values()):
        what = "texts" if isinstance(records[0], Text) else "prompts"
        yield f"{duplicates} rows repeat earlier {what} (splits keep equal prompts together)"
    responses = [text for record in records for text in trained_texts(record)]
    if empty := sum(not text.strip() for text in responses):
        yield f"{empty} of {len(responses)} responses are empty"
    rankings = [record for record in records if isinstance(record, Ranking)]
    read = [_as_read(ranking, chat) for ranking in rankings]
    if orderless := sum(not ranking.pairs() for ranking in read):
        yield (
            f"{orderless} of {len(rankings)} rankings have no pair: their responses are tied, "
            "unranked or equal"
        )
    if equal := [ranking for ranking in read if ranking.equal_pairs()]:
        yield (
            f"{len(equal)} rankings compare a response with an equal one, which training leaves "
            f"out{name_rows(equal)}"
        )


def render(record: Record, chat: "Chat | None") -> list[Piece]:
    """Render the example in pieces, special tokens included; a ranking shows its prompt once."""
    pieces = []
    if not isinstance(record, Text):
        pieces.append(Piece(text=_rendered_prompt(record.prompt, chat), trained=False))
    if isinstance(record, Ranking):
        for i, (rank, response) in enumerate(zip(record.ranks, record.responses, strict=True)):
            label = f"response {i}" if record.probabilities else f"rank {rank or 'none'}"
            pieces.append(Piece(text=f"\n--- {label}: ", trained=False))
            pieces.append(Piece(text=_rendered_response(response, chat), trained=True))
        for i, j, p in record.probabilities:
            text = f"\n--- response {i} is better than {j} with probability {p:g}"
            pieces.append(Piece(text=text, trained=False))
    elif isinstance(record, Demonstration):
        pieces.append(Piece(text=_rendered_response(record.response, chat), trained=True))
    elif isinstance(record, Text):
        pieces.append(Piece(text=_rendered_text(record.text, chat), trained=True))
    return pieces


def mark(pieces: Iterable[Piece], *, colour: bool) -> str:
    """Join the pieces into one text; mark trained ones green on a terminal, else with [[ ]]."""
    before, after = (_GREEN, _PLAIN) if colour else ("[[", "]]")
    return "".join(
        f"{before}{piece.text}{after}" if piece.trained else piece.text for piece in pieces
    )


def trained_texts(record: Record) -> tuple[str, ...]:
    """Return what a stage trains on: responses, or the text itself; a prompt has none."""
    if isinstance(record, Ranking):
        return record.responses
    if isinstance(record, Demonstration):
        return (record.response,)
    return (record.text,) if isinstance(record, Text) else ()


def _load_chat(path: str) -> "Chat":
    # Imported here because torch takes seconds to import, and most checks do not need it.
    from rlhf.inputs.chat import Chat
    from rlhf.models.tokenizers import load_tokenizer

    return Chat(load_tokenizer(path))


def _ranking_statistics(rankings: Sequence[Ranking]) -> Iterator[str]:
    num_responses = Counter(len(ranking.responses) for ranking in rankings)
    pairs = [
        (ranking.responses[i], ranking.responses[j])
        for ranking in rankings
        for i, j in ranking.pairs()
    ]
    hard = [ranking for ranking in rankings if not ranking.probabilities]
    unranked = sum(ranking.ranks.count(None) for ranking in hard)
    tied = sum(
        comb(len(ranking.ranks) - ranking.ranks.count(None), 2) - len(ranking.pairs())
        for ranking in hard
    )
    yield f"K (responses a ranking): {_histogram(num_responses)}"
    yield f"pairs {len(pairs)}, tied pairs {tied}, unranked responses {unranked}"
    if soft := [p for one in rankings if one.probabilities for _, _, p in one.preferences()]:
        yield (
            f"pairs with a probability {len(soft)}, of which even ones "
            f"{sum(p == 0.5 for p in soft)}; the likelier response has {fmean(soft):.3f} on average"
        )
    weights = [ranking.weight for ranking in rankings]
    if set(weights) != {1}:
        yield f"weight: min {min(weights):g}, mean {fmean(weights):g}, max {max(weights):g}"
    if pairs:
        longer = fmean(_longer_wins(better, worse) for better, worse in pairs)
        yield f"the longer response is the better one in {longer:.1%} of pairs"
    for name in ("source", "labeler"):
        names = Counter(getattr(ranking, name) or "none given" for ranking in rankings)
        yield f"{name}: {', '.join(f'{key} {count}' for key, count in names.most_common(8))}"


def _refuse_orderless(file: str, records: Sequence[Record], chat: "Chat | None") -> None:
    rankings = [record for record in records if isinstance(record, Ranking)]
    if rankings and not any(_as_read(ranking, chat).pairs() for ranking in rankings):
        raise ValueError(
            f"{file}: in all {len(rankings)} rankings every response is tied or unranked, or is "
            "preferred to the same text, so there is nothing to learn; give at least two different "
            "responses of different ranks in a row, or a probability other than 0.5"
        )


def _as_read(ranking: Ranking, chat: "Chat | None") -> Ranking:
    """Return the ranking as the rm stage reads it: responses with equal ids count as equal."""
    if chat is None:
        return ranking
    return with_equal_responses(ranking, [chat.response_ids(text) for text in ranking.responses])


def _longer_wins(better: str, worse: str) -> float:
    """Return 1 if the better response is longer, 0 if it is shorter, 0.5 for equal lengths."""
    return 0.5 * ((len(better) > len(worse)) + (len(better) >= len(worse)))


def _prompt_length(record: Demonstration | Ranking | Prompt, chat: "Chat | None") -> int:
    if chat is None:
        return sum(len(turn["content"]) for turn in to_messages(record.prompt))
    with naming_row(record):
        return len(chat.prompt_ids(record.prompt))


def _trained_lengths(record: Record, chat: "Chat | None") -> list[int]:
    texts = trained_texts(record)
    if chat is None:
        return [len(text) for text in texts]
    with naming_row(record):
        encode = chat.text_ids if isinstance(record, Text) else chat.response_ids
        return [len(encode(text)) for text in texts]


def _rendered_prompt(prompt: PromptLike, chat: "Chat | None") -> str:
    if chat is None:
        turns = (f"{turn['role']}: {turn['content']}\n" for turn in to_messages(prompt))
        return "".join(turns) + "assistant: "
    return chat.show(chat.prompt_ids(prompt))


def _rendered_response(response: str, chat: "Chat | None") -> str:
    if chat is None:
        return response + "<end>"
    return chat.show(chat.response_ids(response))


def _rendered_text(text: str, chat: "Chat | None") -> str:
    return text if chat is None else chat.show(chat.text_ids(text))


def _lengths(name: str, values: Sequence[int], chat: "Chat | None") -> str:
    return (
        f"{name} length in {'characters' if chat is None else 'tokens'}: min {min(values)}, "
        f"median {median(values):g}, mean {fmean(values):.1f}, max {max(values)}"
    )


def _histogram(counts: Counter[int]) -> str:
    return ", ".join(f"{value} ({count} rows)" for value, count in sorted(counts.items()))


def _legend(kind: str, colour: bool) -> str:
    if kind == Prompt.kind:
        return "the policy continues it"
    return f"what is trained on is {f'{_GREEN}green{_PLAIN}' if colour else 'in [[ ]]'}"


def main(args: Sequence[str] | None = None) -> None:
    """Run the check; the file may be given without `--file`."""
    words = list(sys.argv[1:] if args is None else args)
    if words and not words[0].startswith("-"):
        words.insert(0, "--file")
    run_stage(check, CheckConfig, words)


if __name__ == "__main__":
    main()
