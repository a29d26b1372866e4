"""Defines the four records that stages exchange on disk, each checked when it is made.

A prompt that is a string stands for one user turn. `messages` is a list of {"role", "content"}. It
may begin with a system turn, then alternates user and assistant, and ends with the user. An empty
response is allowed, because a policy may sample one.
"""

import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, ClassVar, Protocol, Self, TypeGuard, TypeVar

Messages = list[dict[str, str]]
PromptLike = str | Messages

Preference = tuple[int, int, float]
"""(i, j, p) means that response i, counted from 0, is better than j with probability p."""

MAX_WEIGHT = 1e6
"""Largest weight of a ranking. The smallest is 1 / this, so that sums of weights stay in fp32."""

ROLES = ("system", "user", "assistant")

LAYOUTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("messages",), "messages"),
    (("conversations",), "sharegpt"),
    (("conversation",), "sharegpt"),
    (("chosen", "rejected"), "preference"),
    (("prompt", "completion"), "prompt_completion"),
    (("instruction", "completions"), "ultrafeedback"),
    (("instruction", "instances"), "self_instruct"),
    (("instruction", "output"), "alpaca"),
    (("instruction", "response"), "dolly"),
    (("info", "summaries"), "tldr"),
    (("prompt", "instruction_id_list"), "ifeval"),
    (("turns", "question_id"), "mt_bench"),
)
"""Maps the fields of a public layout to its name in `python -m data.convert --format`."""

PROMPT_COLUMNS = ("prompt", "instruction", "question", "query", "problem", "input")
RESPONSE_COLUMNS = ("response", "answer", "output", "completion", "solution", "target")
"""Usual names of two columns that hold a prompt and its response."""


class RecordError(ValueError):
    """Says that a field cannot be used: which one, what was found and expected, the remedy."""

    def __init__(self, field: str, *, found: str, expected: str, remedy: str) -> None:
        super().__init__(f"field {field!r}: found {found}; expected {expected}; {remedy}")
        self.field = field
        self.found = found
        self.expected = expected
        self.remedy = remedy


def _place_field() -> Any:
    """Make the field for a record's file and row, which messages name; None if made in memory."""
    return field(default=None, kw_only=True, compare=False, repr=False)


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate (SFT)."""

    kind: ClassVar[str] = "demonstration"

    prompt: PromptLike
    response: str
    place: str | None = _place_field()

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_text("response", self.response)

    @property
    def key(self) -> str:
        """The prompt, by which records are split and joined."""
        return prompt_key(self.prompt)

    @classmethod
    def from_row(cls, row: dict[str, Any], place: str | None = None) -> Self:
        """Make a record from one JSON object. Raises RecordError."""
        _check_row(row, required=("prompt", "response"))
        return cls(prompt=row["prompt"], response=row["response"], place=place)

    def to_row(self) -> dict[str, Any]:
        """Return the JSON object that `from_row` reads back."""
        return {"prompt": self.prompt, "response": self.response}


@dataclass(frozen=True)
class Ranking:
    """A prompt and K >= 2 responses with a labeler's ranks, or with probabilities of pairs.

    Rank 1 is best, equal ranks are ties, and None is unranked. A comparison of two has K = 2. Soft
    labels, from an AI or a crowd, are `probabilities`; all ranks are then None.
    """

    kind: ClassVar[str] = "ranking"

    prompt: PromptLike
    responses: tuple[str, ...]
    ranks: tuple[int | None, ...]
    source: str | None = None
    labeler: str | None = None
    probabilities: tuple[Preference, ...] = ()
    weight: float = 1.0
    """Weight of this ranking in the loss relative to others, such as trust in its labeler."""
    place: str | None = _place_field()

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_responses(self.responses)
        # NumPy and pandas write 1 as 1.0, or as a number type of their own.
        triples = tuple(_plain_triple(one) for one in self.probabilities)
        for name, value in (
            ("ranks", tuple(_plain_whole(rank) for rank in self.ranks)),
            ("probabilities", triples),
            ("weight", _plain(self.weight)),
        ):
            object.__setattr__(self, name, value)
        _check_ranks(self.ranks, len(self.responses))
        for name in ("source", "labeler"):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name))
        _check_probabilities(self.probabilities, self.ranks)
        _check_weight(self.weight)

    @property
    def key(self) -> str:
        """The prompt, by which records are split and joined."""
        return prompt_key(self.prompt)

    @classmethod
    def from_row(cls, row: dict[str, Any], place: str | None = None) -> Self:
        """Make a record from one JSON object. Raises RecordError."""
        is_soft = isinstance(row, dict) and row.get("probabilities") is not None
        required = ("prompt", "responses") if is_soft else ("prompt", "responses", "ranks")
        optional = ("ranks", "probabilities", "weight", "source", "labeler")
        _check_row(row, required=required, optional=optional)
        responses = _to_tuple("responses", row["responses"])
        ranks = row.get("ranks")
        if is_soft and ranks is None:
            ranks = [None] * len(responses)
        probabilities = _to_tuple("probabilities", row["probabilities"]) if is_soft else ()
        weight = row.get("weight")
        return cls(
            prompt=row["prompt"],
            responses=responses,
            ranks=_to_tuple("ranks", ranks),
            source=row.get("source"),
            labeler=row.get("labeler"),
            probabilities=tuple(
                _to_tuple(f"probabilities[{number}]", one)
                for number, one in enumerate(probabilities)
            ),
            weight=1.0 if weight is None else weight,
            place=place,
        )

    def to_row(self) -> dict[str, Any]:
        """Return the JSON object that `from_row` reads back."""
        row = {
            "prompt": self.prompt,
            "responses": list(self.responses),
            "ranks": None if self.probabilities else list(self.ranks),
            "probabilities": [list(triple) for triple in self.probabilities] or None,
            "weight": None if self.weight == 1 else self.weight,
            "source": self.source,
            "labeler": self.labeler,
        }
        return {name: value for name, value in row.items() if value is not None}

    def preferences(self) -> list[Preference]:
        """Return all compared pairs as (better, worse, probability >= 0.5).

        Ranks give probability 1; ties and unranked responses give no pair. Pairs of equal responses
        are left out, because no score can prefer one of the two.
        """
        texts = self.responses
        return [(i, j, p) for i, j, p in self._judgements() if texts[i] != texts[j]]

    def equal_pairs(self) -> list[tuple[int, int]]:
        """Return the compared pairs that `preferences` leaves out."""
        texts = self.responses
        return [(i, j) for i, j, _ in self._judgements() if texts[i] == texts[j]]

    def pairs(self) -> list[tuple[int, int]]:
        """Return (better, worse) pairs of indices into `responses`, except those of p = 1/2."""
        return [(i, j) for i, j, p in self.preferences() if p > 0.5]

    def _judgements(self) -> list[Preference]:
        if not self.probabilities:
            return preferences_of(self.ranks)
        return [(i, j, p) if p >= 0.5 else (j, i, 1 - p) for i, j, p in self.probabilities]

    def restricted_to(self, kept: Sequence[int]) -> Self:
        """Return the ranking of only these responses, in this order."""
        place = {old: new for new, old in enumerate(kept)}
        return replace(
            self,
            responses=tuple(self.responses[i] for i in kept),
            ranks=tuple(self.ranks[i] for i in kept),
            probabilities=tuple(
                (place[i], place[j], p)
                for i, j, p in self.probabilities
                if i in place and j in place
            ),
        )


@dataclass(frozen=True)
class Prompt:
    """A prompt to sample from. PPO's rewards get its `meta`."""

    kind: ClassVar[str] = "prompt"

    prompt: PromptLike
    meta: dict[str, Any] = field(default_factory=dict)
    place: str | None = _place_field()

    def __post_init__(self) -> None:
        _check_prompt(self.prompt)
        _check_meta(self.meta)

    @property
    def key(self) -> str:
        """The prompt, by which records are split and joined."""
        return prompt_key(self.prompt)

    @classmethod
    def from_row(cls, row: dict[str, Any], place: str | None = None) -> Self:
        """Make a record from one JSON object. Raises RecordError."""
        _check_row(row, required=("prompt",), optional=("meta",))
        meta = row.get("meta")
        return cls(prompt=row["prompt"], meta={} if meta is None else meta, place=place)

    def to_row(self) -> dict[str, Any]:
        """Return the JSON object that `from_row` reads back."""
        return {"prompt": self.prompt, "meta": self.meta} if self.meta else {"prompt": self.prompt}


@dataclass(frozen=True)
class Text:
    """One document of plain text (pretraining, ptx)."""

    kind: ClassVar[str] = "text"

    text: str
    place: str | None = _place_field()

    def __post_init__(self) -> None:
        _check_text("text", self.text)
        if not self.text.strip():
            raise RecordError(
                "text",
                found="no text but white space",
                expected="a document",
                remedy="remove the row",
            )

    @property
    def key(self) -> str:
        """The text, by which records are split and joined."""
        return self.text

    @classmethod
    def from_row(cls, row: dict[str, Any], place: str | None = None) -> Self:
        """Make a record from one JSON object. Raises RecordError."""
        _check_row(row, required=("text",))
        return cls(text=row["text"], place=place)

    def to_row(self) -> dict[str, Any]:
        """Return the JSON object that `from_row` reads back."""
        return {"text": self.text}


Record = Demonstration | Ranking | Prompt | Text


class _AnyRecord(Protocol):
    """Interface of all records, for functions that take every kind."""

    kind: ClassVar[str]

    @property
    def place(self) -> str | None: ...

    @property
    def key(self) -> str: ...

    @classmethod
    def from_row(cls, row: dict[str, Any], place: str | None = None) -> Self: ...

    def to_row(self) -> dict[str, Any]: ...


RecordT = TypeVar("RecordT", bound=_AnyRecord)

RECORD_CLASSES: dict[str, type[Record]] = {
    "demonstration": Demonstration,
    "ranking": Ranking,
    "prompt": Prompt,
    "text": Text,
}


def to_messages(prompt: PromptLike) -> Messages:
    """Return a prompt as messages; a string is one user turn."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_key(prompt: PromptLike) -> str:
    """Return one key for all forms of a prompt: string or user turn, any white space."""
    turns = [[turn["role"], " ".join(turn["content"].split())] for turn in to_messages(prompt)]
    return json.dumps(turns, ensure_ascii=False)


def with_equal_responses(ranking: Ranking, ids: Sequence[Sequence[int]]) -> Ranking:
    """Give one text to all responses that have the same ids under a tokenizer."""
    text_of: dict[tuple[int, ...], str] = {}
    texts = [
        text_of.setdefault(tuple(one), text)
        for one, text in zip(ids, ranking.responses, strict=True)
    ]
    return replace(ranking, responses=tuple(texts))


def preferences_of(ranks: Sequence[float | None]) -> list[Preference]:
    """Return (better, worse, 1.0) for every pair of ranks, where smaller is better.

    Ties and None give no pair."""
    ranked = [(i, rank) for i, rank in enumerate(ranks) if rank is not None]
    return [(i, j, 1.0) for i, left in ranked for j, right in ranked if left < right]


@contextmanager
def naming_row(record: _AnyRecord) -> Iterator[None]:
    """Put a record's file and row in front of a ValueError that is raised in the block."""
    try:
        yield
    except ValueError as error:
        if record.place is None:
            raise
        raise ValueError(f"{record.place}: {error}") from error


def name_rows(records: Sequence[_AnyRecord], most: int = 3) -> str:
    """Return ` (FILE, row 3; FILE, row 8)` for a message; "" for records made in memory."""
    places = [record.place for record in records if record.place is not None]
    more = f" and {len(places) - most} more" if len(places) > most else ""
    return f" ({'; '.join(places[:most])}{more})" if places else ""


def find_layout(row: object) -> str | None:
    """Return the name of the public layout whose fields a row has; None if none is known."""
    if isinstance(row, str):
        return "strings"
    if not isinstance(row, dict):
        return None
    if "####" in str(row.get("answer")) and "question" in row:
        return "gsm8k"
    if isinstance(row.get("chosen"), str) and "rejected" in row and "prompt" not in row:
        return "hh"
    return next((layout for names, layout in LAYOUTS if all(n in row for n in names)), None)


def show(value: object) -> str:
    """Return a short form of a value for an error message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    try:
        return short.repr(value)
    except ValueError:  # an int with more digits than Python prints
        return f"a very long {type(value).__name__}"


def _check_row(row: object, *, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    """Check as `_check_fields`. The error for a row of a public layout names its converter."""
    try:
        _check_fields(row, required=required, optional=optional)
    except RecordError as error:
        remedy = _conversion(row)
        if remedy is None:
            raise
        raise RecordError(
            error.field, found=error.found, expected=error.expected, remedy=remedy
        ) from None


def _conversion(row: object) -> str | None:
    """Say how to convert a row of a foreign layout; None for a faulty row of ours."""
    command = "convert the file with `python -m data.convert --format"
    layout = find_layout(row)
    if layout is not None:
        return f"{command} {layout}`"
    if not isinstance(row, dict):
        return None
    prompt = next((name for name in PROMPT_COLUMNS if isinstance(row.get(name), str)), None)
    response = next((name for name in RESPONSE_COLUMNS if isinstance(row.get(name), str)), None)
    if prompt is None or response is None or (prompt, response) == ("prompt", "response"):
        return None
    return f"{command} columns --prompt_column {prompt} --response_column {response}`"


def _check_fields(
    row: object, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> None:
    known = tuple(dict.fromkeys(required + optional))
    if not isinstance(row, dict):
        raise RecordError(
            "row",
            found=show(row),
            expected=f"a JSON object with {', '.join(required)}",
            remedy="write one object a line",
        )
    for name in row:
        if name in known:
            continue
        nearest = get_close_matches(str(name), known, n=1, cutoff=0.5)
        remedy = f"did you mean {nearest[0]!r}?" if nearest else "rename or remove it"
        raise RecordError(
            str(name), found="an unknown field", expected=f"only {', '.join(known)}", remedy=remedy
        )
    for name in required:
        if name not in row:
            raise RecordError(
                name,
                found=f"no such field (the row has {', '.join(row) or 'none'})",
                expected=f"{', '.join(required)} in every row",
                remedy="add it, or convert the file with `python -m data.convert`",
            )


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise RecordError(
            name,
            found=f"{show(value)} ({type(value).__name__})",
            expected="a string",
            remedy="put the text in quotes",
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RecordError(
            name,
            found=f"half of a surrogate pair at character {error.start}",
            expected="text that UTF-8 can hold",
            remedy="repair the text where it was exported",
        ) from None


def _check_prompt(prompt: object) -> None:
    if isinstance(prompt, list):
        _check_messages(prompt)
        return
    if not isinstance(prompt, str):
        raise RecordError(
            "prompt",
            found=f"{show(prompt)} ({type(prompt).__name__})",
            expected="a string or a list of messages",
            remedy='write "text" or [{"role": "user", "content": "text"}]',
        )
    _check_text("prompt", prompt)
    if not prompt.strip():
        raise RecordError(
            "prompt", found=show(prompt), expected="a prompt with text", remedy="remove the row"
        )


def _check_messages(messages: list[Any]) -> None:
    if not messages:
        raise RecordError(
            "prompt",
            found="no messages",
            expected="at least one user turn",
            remedy="remove the row",
        )
    for i, turn in enumerate(messages):
        name = f"prompt[{i}]"
        try:
            _check_fields(turn, required=("role", "content"))
        except RecordError as error:
            raise RecordError(
                f"{name}.{error.field}",
                found=error.found,
                expected=error.expected,
                remedy=error.remedy,
            ) from None
        _check_text(f"{name}.role", turn["role"])
        _check_text(f"{name}.content", turn["content"])
        _check_role(name, turn["role"], messages[i - 1]["role"] if i else None)
        if turn["role"] == "user" and not turn["content"].strip():
            raise RecordError(
                f"{name}.content",
                found=show(turn["content"]),
                expected="a user turn with text",
                remedy="remove the turn or the row",
            )
    if messages[-1]["role"] != "user":
        raise RecordError(
            f"prompt[{len(messages) - 1}].role",
            found=show(messages[-1]["role"]),
            expected="'user' in the last turn",
            remedy="move the last assistant turn to the response",
        )


def _check_role(name: str, role: str, previous: str | None) -> None:
    """Check that turns alternate, because most chat templates refuse or garble anything else."""
    if role not in ROLES:
        raise RecordError(
            f"{name}.role",
            found=show(role),
            expected=f"one of {', '.join(ROLES)}",
            remedy="rename it",
        )
    allowed = {
        None: ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user",),
    }
    if role not in allowed[previous]:
        place = f"after {previous!r}" if previous else "in the first turn"
        raise RecordError(
            f"{name}.role",
            found=f"{role!r} {place}",
            expected=" or ".join(allowed[previous]),
            remedy="join neighbouring turns of one role; a system turn comes first",
        )


def _check_responses(responses: tuple[Any, ...]) -> None:
    for i, response in enumerate(responses):
        _check_text(f"responses[{i}]", response)
    if len(responses) < 2:
        raise RecordError(
            "responses",
            found=f"{len(responses)} (K = {len(responses)})",
            expected="at least 2 responses to compare",
            remedy="remove the row, or use it as a demonstration",
        )


def _plain(value: Any) -> Any:
    """Turn a number of NumPy or torch into Python's; leave anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def _plain_whole(value: Any) -> Any:
    """Turn 1.0 into 1, as pandas writes whole numbers in a column with gaps; NumPy's too."""
    value = _plain(value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _plain_triple(value: Any) -> Any:
    if not isinstance(value, tuple) or len(value) != 3:
        return value
    i, j, p = value
    return _plain_whole(i), _plain_whole(j), _plain(p)


def _check_ranks(ranks: tuple[Any, ...], num_responses: int) -> None:
    for i, rank in enumerate(ranks):
        is_rank = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
        if rank is None or is_rank:
            continue
        remedy = "number the ranks from 1"
        if isinstance(rank, float) and math.isnan(rank):
            remedy = "write null for NaN, in Python None, where a response is unranked"
        elif isinstance(rank, float):
            remedy = "give tied responses the same whole rank (pandas: rank(method='min'))"
        raise RecordError(
            f"ranks[{i}]",
            found=show(rank),
            expected="a whole number from 1 (best), or null (unranked)",
            remedy=remedy,
        )
    if len(ranks) != num_responses:
        raise RecordError(
            "ranks",
            found=f"{len(ranks)} ranks for {num_responses} responses",
            expected="one rank a response",
            remedy="give every response a rank, null where it has none",
        )


def _check_probabilities(probabilities: tuple[Any, ...], ranks: tuple[int | None, ...]) -> None:
    if probabilities and any(rank is not None for rank in ranks):
        raise RecordError(
            "probabilities",
            found=f"{len(probabilities)} pairs beside ranks {show(list(ranks))}",
            expected="either ranks or probabilities",
            remedy="leave one of the two out, or make two rows of it",
        )
    seen: set[frozenset[int]] = set()
    for number, one in enumerate(probabilities):
        name = f"probabilities[{number}]"
        if not isinstance(one, tuple) or len(one) != 3:
            raise RecordError(
                name,
                found=show(one),
                expected="[i, j, p]: two responses, and the probability that the first is better",
                remedy="write [0, 1, 0.7]",
            )
        i, j, p = one
        for index in (i, j):
            is_index = isinstance(index, int) and not isinstance(index, bool)
            if not is_index or not 0 <= index < len(ranks):
                raise RecordError(
                    name,
                    found=f"response {show(index)}",
                    expected=f"a whole number from 0 to {len(ranks) - 1}",
                    remedy="count the responses from 0",
                )
        if not _is_number(p) or not 0 <= p <= 1:
            raise RecordError(
                name,
                found=f"probability {show(p)}",
                expected="a number from 0 to 1",
                remedy="divide a percentage by 100, votes by their number",
            )
        pair = frozenset((i, j))
        if len(pair) == 1 or pair in seen:
            raise RecordError(
                name,
                found=f"response {i} against itself" if i == j else f"the pair {i}, {j} once more",
                expected="two different responses, every pair at most once",
                remedy="remove it, or join the judgements of a pair into one probability",
            )
        seen.add(pair)


def _check_weight(weight: object) -> None:
    if not _is_number(weight) or not 1 / MAX_WEIGHT <= weight <= MAX_WEIGHT:
        raise RecordError(
            "weight",
            found=show(weight),
            expected=f"a number from {1 / MAX_WEIGHT:g} to {MAX_WEIGHT:g}",
            remedy="leave it out for 1; to train without a ranking, remove the row",
        )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_meta(meta: object) -> None:
    plain = isinstance(meta, dict)
    try:
        text = json.dumps(meta, ensure_ascii=False, allow_nan=False)
        text.encode()
        plain = plain and json.loads(text) == meta
    except (TypeError, ValueError, RecursionError):
        plain = False
    if not plain:
        raise RecordError(
            "meta",
            found=show(meta),
            expected="a JSON object",
            remedy='write {"name": value, ...}, without NaN, or leave it out',
        )


def _to_tuple(name: str, value: object) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise RecordError(
            name,
            found=f"{show(value)} ({type(value).__name__})",
            expected="a list",
            remedy="put the values in [ ]",
        )
    return tuple(value)
