"""Check whether a response follows an instruction, and turn the checks into a reward.

There is one pure function for each kind of instruction. A response without any word follows none,
since an empty response would otherwise follow "Do not use any commas".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rlhf.inputs.files import read_records
from rlhf.inputs.records import Prompt, PromptLike, prompt_key

Instruction = dict[str, Any]
"""Holds a kind and its arguments, such as {"kind": "words_at_most", "count": 20}. A prompt has them
in meta.instructions."""

_WORD = re.compile(r"\w+(?:['\u2019-]\w+)*")
_STOP = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]*]*(?=\s|$)")
_LAST_WORD = re.compile(r"(?:^|[\s(\"'\u201c])([^\s(\"'\u201c]+)$")
_INITIALS = re.compile(r"(?:[A-Za-z]\.)*[A-Za-z]")
_ABBREVIATIONS = {"mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "vs", "etc", "no", "approx"}
_BULLET = re.compile(r"\s*[\"\u201c]?[*\-\u2022] +\S")
_QUOTES = {'"': '"', "\u201c": "\u201d"}


def words(text: str) -> list[str]:
    """Return the runs of letters and digits; don't and well-known are one word each."""
    return _WORD.findall(text)


def sentences(text: str) -> list[str]:
    """Split a text after . ! ? and any closing quotes and brackets; leave out parts without a word.

    A full stop ends no sentence after an abbreviation or initials (Dr., e.g., J. K.), after the
    number of a list item, or before anything but white space (3.5). A line break ends none.
    """
    found = []
    start = 0
    for stop in _STOP.finditer(text):
        if stop[0] == "." and _is_abbreviated(text[start : stop.start()]):
            continue
        found.append(text[start : stop.end()])
        start = stop.end()
    return [one.strip() for one in [*found, text[start:]] if words(one)]


def _is_abbreviated(before: str) -> bool:
    last = _LAST_WORD.search(before)
    if last is None:
        return False
    word = last[1]
    if word.isdigit():  # "1. First" is a list item if nothing precedes the number in its line
        return not before[: last.start(1)].rpartition("\n")[2].strip()
    return word.lower() in _ABBREVIATIONS or (_INITIALS.fullmatch(word) is not None and word != "I")


def count_word(text: str, word: str) -> int:
    """Count a word or phrase in a text, in any case, but not as part of a longer word."""
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    return len(re.findall(pattern, text, flags=re.IGNORECASE))


def no_comma(text: str) -> bool:
    return not any(comma in text for comma in ",\uff0c\u060c\u3001")


def lowercase(text: str) -> bool:
    return text == text.lower() and any(letter.islower() for letter in text)


def uppercase(text: str) -> bool:
    return text == text.upper() and any(letter.isupper() for letter in text)


def quoted(text: str) -> bool:
    """Return whether the whole text is between double quotation marks."""
    text = text.strip()
    return len(text) > 2 and _QUOTES.get(text[0]) == text[-1]


def words_at_least(text: str, count: int) -> bool:
    return len(words(text)) >= count


def words_at_most(text: str, count: int) -> bool:
    return len(words(text)) <= count


def sentences_at_least(text: str, count: int) -> bool:
    return len(sentences(text)) >= count


def sentences_at_most(text: str, count: int) -> bool:
    return len(sentences(text)) <= count


def contains(text: str, words: Sequence[str]) -> bool:
    """Return whether the text has all of the words."""
    return all(count_word(text, word) for word in words)


def avoids(text: str, words: Sequence[str]) -> bool:
    """Return whether the text has none of the words."""
    return not any(count_word(text, word) for word in words)


def times_at_least(text: str, word: str, count: int) -> bool:
    return count_word(text, word) >= count


def times_at_most(text: str, word: str, count: int) -> bool:
    return count_word(text, word) <= count


def characters_at_least(text: str, character: str, count: int) -> bool:
    return text.lower().count(character.lower()) >= count


def characters_at_most(text: str, character: str, count: int) -> bool:
    return text.lower().count(character.lower()) <= count


def ends_with(text: str, phrase: str) -> bool:
    """Return whether the text ends with the phrase, in any case, before closing quotes and white
    space."""
    return text.rstrip(' \t\n"\u201d').lower().endswith(phrase.rstrip(' "\u201d').lower())


def bullets(text: str, count: int) -> bool:
    """Return whether exactly `count` lines start with a bullet, after an opening quote if any."""
    return sum(_BULLET.match(line) is not None for line in text.splitlines()) == count


CHECKS: dict[str, Callable[..., bool]] = {
    check.__name__: check
    for check in (
        no_comma,
        lowercase,
        uppercase,
        quoted,
        words_at_least,
        words_at_most,
        sentences_at_least,
        sentences_at_most,
        contains,
        avoids,
        times_at_least,
        times_at_most,
        characters_at_least,
        characters_at_most,
        ends_with,
        bullets,
    )
}
"""Maps a kind of instruction to its check, which takes a response and the instruction's
arguments."""


def follows_one(response: str, instruction: Instruction) -> bool:
    """Return whether a response follows an instruction.

    Raises:
        ValueError: there is no such kind, or it takes other arguments.
    """
    arguments = dict(instruction)
    kind = arguments.pop("kind", None)
    if kind not in CHECKS:
        nearest = get_close_matches(str(kind), CHECKS, n=1)
        raise ValueError(
            f"unknown kind of instruction {kind!r}; "
            + (f"did you mean {nearest[0]}?" if nearest else f"known are {', '.join(CHECKS)}")
        )
    if not words(response):
        return False
    try:
        return CHECKS[kind](response, **arguments)
    except TypeError as error:
        raise ValueError(f"instruction {instruction}: {error}") from error


def share_followed(response: str, instructions: Sequence[Instruction]) -> float:
    """Return the share of the instructions that the response follows, 0 to 1."""
    return sum(follows_one(response, one) for one in instructions) / len(instructions)


def follows(
    prompts: Sequence[PromptLike], responses: Sequence[str], metas: Sequence[dict[str, Any]]
) -> list[float]:
    """Compute the rule reward: the share of each prompt's instructions that its response follows.

    Raises:
        ValueError: a prompt has no meta.instructions, or an instruction that no check knows.
    """
    scores = []
    for i, (response, meta) in enumerate(zip(responses, metas, strict=True)):
        if not meta.get("instructions"):
            raise ValueError(
                f"prompt {i} has no meta.instructions; make prompts with "
                "`python -m data.instructions`"
            )
        scores.append(share_followed(response, meta["instructions"]))
    return scores


@dataclass(frozen=True)
class Gold:
    """Computes `follows` where no meta is given; it looks the instructions up by the prompt."""

    instructions: Mapping[str, list[Instruction]]
    """Maps the key of a prompt to its instructions."""

    def __call__(self, prompts: Sequence[PromptLike], responses: Sequence[str]) -> list[float]:
        return follows(prompts, responses, [{"instructions": of} for of in self._find(prompts)])

    def parts(
        self, prompts: Sequence[PromptLike], responses: Sequence[str]
    ) -> list[dict[str, float]]:
        """Return, for each kind of instruction in a prompt, the share that the response follows.

        Other kinds are left out, since a prompt that does not ask for bullets says nothing about
        bullets.
        """
        pairs = zip(self._find(prompts), responses, strict=True)
        return [
            {
                kind: share_followed(response, [one for one in asked if one["kind"] == kind])
                for kind in dict.fromkeys(one["kind"] for one in asked)
            }
            for asked, response in pairs
        ]

    def _find(self, prompts: Sequence[PromptLike]) -> list[list[Instruction]]:
        return [self.instructions[prompt_key(prompt)] for prompt in prompts]


def make_gold(path: str | Path) -> Gold:
    """Make the judge for the prompts in a file."""
    records = read_records(path, Prompt)
    return Gold({record.key: record.meta.get("instructions", []) for record in records})
