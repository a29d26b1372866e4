"""Turns text into ids so that only names written by a template become control tokens.

A tokenizer takes the text "<|im_end|>" for its control token, no matter who wrote it. Here the
caller says for each piece of a text whether such names are tokens. If not, they are plain text.
"""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]
"""A piece of a text, and whether names of control tokens in it are control tokens."""

_PRIVATE = range(0xF0000, 0xFFFFE)
"""Unicode characters for private use. One of them marks the names that are tokens."""


class ControlTokens:
    """Encodes texts in which names of these control tokens may also be plain text.

    A text without such names gets the ids that the tokenizer gives. Any other text goes through a
    copy of the tokenizer in which the control tokens have other names. The normaliser, the rules
    about spaces and all other tokens are the same.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self._tokenizer = tokenizer
        longest_first = sorted(self.names, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._copies: dict[str, Tokenizer] = {}

    def are_in(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def found_in(self, text: str) -> list[str]:
        """Return the names in a text, each only once."""
        return list(dict.fromkeys(self._pattern.findall(text)))

    def encode(self, pieces: Sequence[Piece]) -> list[int]:
        """Return the ids of the joined pieces, without special tokens around them."""
        if not any(self.are_in(text) for text, counts in pieces if not counts):
            return self._ids("".join(text for text, _ in pieces), split_special_tokens=False)
        if not isinstance(getattr(self._tokenizer, "backend_tokenizer", None), Tokenizer):
            return self._encode_by_pieces(pieces)
        marker = free_character("".join(text for text, _ in pieces))
        marked = "".join(
            self._pattern.sub(lambda found: f"{marker}{found.group()}{marker}", text)
            if counts
            else text
            for text, counts in pieces
        )
        if marker not in self._copies:
            self._copies[marker] = self._renamed(marker)
        copy = self._copies[marker]
        ids = copy.encode(marked, add_special_tokens=False).ids
        return [self._id(str(copy.id_to_token(number)).strip(marker)) for number in ids]

    def _encode_by_pieces(self, pieces: Sequence[Piece]) -> list[int]:
        """Encode each run of plain text on its own, for a tokenizer that cannot be copied."""
        parts: list[Piece] = [("", False)]
        for text, counts in pieces:
            words = self._pattern.split(text) if counts else [text]
            names = self._pattern.findall(text) if counts else []
            parts[-1] = (parts[-1][0] + words[0], False)
            for name, following in zip(names, words[1:], strict=True):
                parts += [(name, True), (following, False)]
        ids: list[int] = []
        for text, is_name in parts:
            if is_name:
                ids.append(self._id(text))
            elif text:
                ids += self._ids(text, split_special_tokens=True)
        return ids

    def _id(self, name: str) -> int:
        number = self._tokenizer.convert_tokens_to_ids(name)
        assert isinstance(number, int)
        return number

    def _ids(self, text: str, *, split_special_tokens: bool) -> list[int]:
        return self._tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens
        ).input_ids

    def _renamed(self, marker: str) -> Tokenizer:
        """Copy the tokenizer with a marker before and after the name of each control token."""
        state: dict[str, Any] = json.loads(self._tokenizer.backend_tokenizer.to_str())
        state |= {"post_processor": None, "truncation": None, "padding": None}
        for entry in state["added_tokens"]:
            if entry["content"] in self.names:
                entry["content"] = f"{marker}{entry['content']}{marker}"
                entry["normalized"] = False
        model = state["model"]
        merged = {_merge_result(merge) for merge in model.get("merges") or ()}
        renamed = {name: f"{marker}{name}{marker}" for name in self.names - merged}
        if isinstance(model["vocab"], dict):
            vocabulary = model["vocab"].items()
            model["vocab"] = {renamed.get(name, name): number for name, number in vocabulary}
        else:  # Unigram has a list of pieces with their scores
            model["vocab"] = [[renamed.get(name, name), score] for name, score in model["vocab"]]
        if model.get("unk_token") in renamed:
            model["unk_token"] = renamed[model["unk_token"]]
        return Tokenizer.from_str(json.dumps(state))


def free_character(text: str) -> str:
    """Return a character of private use that is not in the text."""
    return next(chr(code) for code in _PRIVATE if chr(code) not in text)


def _merge_result(merge: str | list[str]) -> str:
    return merge.replace(" ", "") if isinstance(merge, str) else "".join(merge)
