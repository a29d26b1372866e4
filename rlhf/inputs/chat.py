"""Renders prompts and responses to token ids, in the one way that every stage uses.

A prompt becomes ids through the tokenizer's chat template with the generation prompt added. A
response becomes its own ids followed by the end-of-response token. The two lists are concatenated
and never tokenized together, so SFT, the reward model, PPO and evaluation see the same ids.

The ids are those that the template renders for the whole conversation, and decode to the original
text. Two traps are avoided. If a person writes the name of a control token, it stays plain text.
The tokenizer's rules about spaces at the start of a text do not apply to the response. A warning
says where this fails.
"""

import hashlib
import re
import unicodedata
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from transformers import PreTrainedTokenizerBase

from rlhf.inputs.control import ControlTokens, Piece, free_character
from rlhf.inputs.records import Messages, PromptLike, to_messages
from rlhf.inputs.template import PROBE, add_missing_parts, find_answer_frame, render


class Chat:
    """Renders prompts and responses with one tokenizer.

    Attributes:
        end_id: The token that ends a response. It is what the template puts after an assistant's
            words if that is a single token, otherwise the tokenizer's end-of-sequence token.
        other_ends: Other tokens at which sampling stops.
        pad_id: The padding token; None if the tokenizer has no free one. Masks do not depend on
            it, because they come from lengths.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, other_ends: Iterable[int] = ()) -> None:
        """Read the template. `other_ends` are end tokens that the model's files declare."""
        other_ends = tuple(other_ends)
        self.tokenizer = add_missing_parts(tokenizer, other_ends)
        self._answer_frame = find_answer_frame(tokenizer)
        self.end_id: int = self._answer_frame.end_id
        ends = {*other_ends, tokenizer.eos_token_id} - {self.end_id}
        self.other_ends: tuple[int, ...] = tuple(sorted(ends))
        self.pad_id: int | None = tokenizer.pad_token_id
        self._control = ControlTokens(tokenizer, self._answer_frame.control_names)
        self._turns = ControlTokens(tokenizer, self._answer_frame.turn_names)
        self._thoughts = ControlTokens(
            tokenizer, self._answer_frame.control_names - self._answer_frame.turn_names
        )
        self._warned_kinds: set[str] = set()
        for difference in self._answer_frame.differences:
            warnings.warn(difference, stacklevel=2)

    def prompt_ids(self, prompt: PromptLike) -> list[int]:
        """Return the ids of a prompt, including the template's generation prompt.

        Only the template writes control tokens. Their names in a turn's content stay plain text.
        """
        messages = to_messages(prompt)
        text = render(self.tokenizer, messages, add_generation_prompt=True)
        pieces = [(text, True)]
        if any(self._control.are_in(message["content"]) for message in messages):
            pieces = self._split_names(messages, text)
        ids = self._control.encode(pieces)
        found = self.show(ids)
        # Compare without white space, because decoding may put spaces between tokens.
        if not _equal_texts("".join(found.split()), "".join(text.split())):
            self._warn_unspelt("prompt", text, found)
        return ids

    def response_ids(self, response: str) -> list[int]:
        """Return the ids of a response, which always end with the end-of-response token.

        A name such as "</s>" in the response stays plain text, so the only end token is the last.
        Only thought markers become tokens. If the response has them, the template's own empty
        thoughts are left out.
        """
        opening = self._answer_frame.opening
        wanted = response
        if any(name in opening for name in self._thoughts.found_in(response)):
            opening, wanted = "", response.removeprefix(self._text_of_opening)
        tried = []
        for spelling in self._spellings(opening, response):
            ids = [*spelling, self.end_id]
            if _equal_texts(self.decode(ids), wanted):
                return ids
            tried.append(ids)
        self._warn_unspelt("response", wanted, self.decode(tried[0]))
        return tried[0]

    def text_ids(self, text: str) -> list[int]:
        """Return the ids of plain text without a template, with the tokenizer's special tokens.

        Names of control tokens in the text stay plain text."""
        before, after = self._surrounding_tokens
        return [*before, *self.bare_text_ids(text), *after]

    def bare_text_ids(self, text: str) -> list[int]:
        """Return `text_ids` without special tokens."""
        ids = self._turns.encode([(text, False)])
        found = self._decoded(ids)
        if _equal_texts(found, text):
            return ids
        if text.startswith(" "):  # the tokenizer may take it for the space it puts before a text
            more = self._turns.encode([(" " + text, False)])
            if _equal_texts(self._decoded(more), text):
                return more
        if not _equal_texts(found, " " + text):
            self._warn_unspelt("text", text, found)
        return ids

    def document_start(self, name: str | None = None) -> int:
        """Return the id of the token that plain documents begin with.

        Args:
            name: a special token, such as <|endoftext|>. None means the tokenizer's BOS, or else
                its EOS token.

        Raises:
            ValueError: `name` is no special token of the tokenizer.
        """
        tokenizer = self.tokenizer
        if name is None:
            bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
            return int(eos if bos is None else bos)
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        special |= tokenizer.get_added_vocab()
        if name not in special:
            raise ValueError(
                f"{name!r} is no special token of the tokenizer, such as "
                f"{', '.join(sorted(special, key=special.__getitem__)[:8])}"
            )
        return special[name]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of response ids, without the end token and special tokens."""
        ids = list(ids)
        words = self._without_end(ids)
        text = self._response_text(words).removeprefix(self._text_of_opening)
        return text.removesuffix(self._answer_frame.closing) if len(words) < len(ids) else text

    def show(self, ids: Sequence[int]) -> str:
        """Return the text of any ids, with special tokens by their names."""
        text = self.tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def has_end(self, ids: Sequence[int]) -> bool:
        """Return whether a sampled response is finished: its last token is an end token."""
        return len(ids) > 0 and (ids[-1] == self.end_id or ids[-1] in self.other_ends)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each token of a response adds; the end token adds its own name.

        Joined without the end token's, the pieces equal `decode` of the ids. If several tokens
        spell a character, the last one gets it and the others add nothing. Special tokens inside
        the response also add nothing. A token's text may depend on its neighbours, so new tokens
        are decoded together with those before them.
        """
        ids = list(ids)
        end = len(self._without_end(ids))
        pieces = []
        first, whole = 0, 0  # ids[first:whole] are context; `pieces` has all text before `whole`
        for stop in range(1, end + 1):
            known, text = (
                self._response_text(ids[first:whole]),
                self._response_text(ids[first:stop]),
            )
            if text.endswith("\ufffd") and stop < end:
                pieces.append("")
                continue
            pieces.append(text[len(known) :])
            if pieces[-1]:
                first = whole  # context must have text, or decoding would treat it as a start
            whole = stop
        if "".join(pieces).startswith(self._text_of_opening):
            pieces = _drop_characters(pieces, len(self._text_of_opening))
        closing = self._answer_frame.closing
        if end < len(ids) and "".join(pieces).endswith(closing):
            backwards = _drop_characters([piece[::-1] for piece in reversed(pieces)], len(closing))
            pieces = [piece[::-1] for piece in reversed(backwards)]
        return [*pieces, *self.tokenizer.convert_ids_to_tokens(ids[end:])]

    def fit_prompt(self, prompt: PromptLike, max_tokens: int) -> list[int] | None:
        """Return the prompt's ids, without its oldest turns if they do not fit; or None.

        Whole turns are dropped from the front, because a prompt cut inside a sentence would be
        another task. A system message stays, and the first kept turn is a user's. None means that
        even the last turn is too long; the caller counts and reports these.
        """
        messages = to_messages(prompt)
        system = messages[:1] if messages[0]["role"] == "system" else []
        turns = messages[len(system) :]
        for start, message in enumerate(turns):
            if message["role"] != "user":
                continue
            ids = self.prompt_ids(system + turns[start:])
            if len(ids) <= max_tokens:
                return ids
        return None

    @cached_property
    def template_hash(self) -> str:
        """SHA-256 of the chat template, for lineage.json."""
        return hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()

    def _split_names(self, messages: Messages, text: str) -> list[Piece]:
        """Split a rendered prompt into names from the turns' contents, and the rest.

        Each name in a content is replaced by a placeholder, and the template renders again. A
        template may look for a name, such as the end of thoughts in an earlier answer. Then hiding
        the name changes the text, so that name is left to the template.
        """
        sign = free_character(text + "".join(message["content"] for message in messages))
        names = self._control.found_in("\n".join(message["content"] for message in messages))
        hidden, shown = messages, text
        for i, message in enumerate(messages):
            own = self._control.found_in(message["content"])
            for some in [own, *([name] for name in own)] if own else []:
                trial = self._try_hiding(hidden, i, some, names, sign, text)
                if trial is not None:
                    hidden, shown = trial
                    if some is own:
                        break
        parts = re.split(f"{sign}([0-9]+){sign}", shown)
        return [
            (names[int(part)], False) if number % 2 else (part, True)
            for number, part in enumerate(parts)
        ]

    def _try_hiding(
        self,
        messages: Messages,
        i: int,
        some: Sequence[str],
        names: Sequence[str],
        sign: str,
        text: str,
    ) -> tuple[Messages, str] | None:
        """Hide names in the i-th message; return messages and rendering if the text is unchanged.

        A second try leaves out white space at both ends, because a template may strip it.
        """
        content = messages[i]["content"]
        start = len(content) - len(content.lstrip())
        stop = max(start, len(content.rstrip()))
        for before, core, after in (
            ("", content, ""),
            (content[:start], content[start:stop], content[stop:]),
        ):
            for name in sorted(some, key=len, reverse=True):
                core = core.replace(name, f"{sign}{names.index(name)}{sign}")
            changed = {**messages[i], "content": before + core + after}
            trial = [*messages[:i], changed, *messages[i + 1 :]]
            try:
                shown = render(self.tokenizer, trial, add_generation_prompt=True)
            except ValueError:
                continue
            found = re.sub(f"{sign}([0-9]+){sign}", lambda match: names[int(match[1])], shown)
            if found == text:
                return trial, shown
        return None

    def _spellings(self, opening: str, response: str) -> Iterator[list[int]]:
        """Yield possible ids of a response, the most likely first.

        1. The ids of the response after the prompt.
        2. The same with one more space, in case the tokenizer removes the first one.
        3. The ids of the response by itself.
        4. The ids after some word, in case prompt and response would share a token.
        """
        closing = self._answer_frame.closing
        for text in (response, " " + response):
            words = [(opening, True), *self._split_markers(text), (closing, True)]
            ids = self._turns.encode([(self._answer_frame.before, True), *words])
            if ids[: len(self._ids_before)] == self._ids_before:
                yield ids[len(self._ids_before) :]
        words = [(opening, True), *self._split_markers(response), (closing, True)]
        yield self._turns.encode(words)
        word = self._turns.encode([(PROBE, True)])
        ids = self._turns.encode([(PROBE, True), *words])
        if ids[: len(word)] == word:
            yield ids[len(word) :]

    def _split_markers(self, text: str) -> list[Piece]:
        """Split a response into plain text and thought markers, which become tokens."""
        names = self._thoughts.found_in(text)
        if not names:
            return [(text, False)]
        parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
        return [(part, number % 2 == 1) for number, part in enumerate(parts)]

    def _without_end(self, ids: list[int]) -> list[int]:
        if self.end_id in ids:
            return ids[: ids.index(self.end_id)]
        return ids[:-1] if self.has_end(ids) else ids

    def _response_text(self, ids: list[int]) -> str:
        """Return the text of a response's tokens after the prompt, without special tokens."""
        text, before = self._decoded([*self._ids_before, *ids]), self._text_before
        return text[len(before) :] if text.startswith(before) else self._decoded(ids)

    def _decoded(self, ids: list[int]) -> str:
        text = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    @cached_property
    def _ids_before(self) -> list[int]:
        """Ids of the text between the question and the response."""
        return self._control.encode([(self._answer_frame.before, True)])

    @cached_property
    def _text_before(self) -> str:
        return self._decoded(self._ids_before)

    @cached_property
    def _text_of_opening(self) -> str:
        """Text that `_response_text` returns before the answer: the opening, and a space that some
        tokenizers add."""
        found = self._response_text(next(self._spellings(self._answer_frame.opening, PROBE)))
        return found[: found.index(PROBE)] if PROBE in found else ""

    @cached_property
    def _surrounding_tokens(self) -> tuple[list[int], list[int]]:
        """The special tokens that the tokenizer puts before and after a text."""
        framed = self.tokenizer(PROBE).input_ids
        bare = self.tokenizer(PROBE, add_special_tokens=False).input_ids
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return framed[:start], framed[start + len(bare) :]
        return [], []

    def _warn_unspelt(self, kind: str, text: str, found: str) -> None:
        """Warn, once for each kind of text, that its ids do not decode to it."""
        if kind in self._warned_kinds:
            return
        self._warned_kinds.add(kind)
        pairs = zip(text, found, strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(text), len(found)))
        place = slice(max(0, same - 10), same + 20)
        warnings.warn(
            f"the tokenizer cannot spell a {kind}: {text[place]!r} in it comes back as "
            f"{found[place]!r}, and so may others; change the text, or take a model whose "
            "tokenizer has these characters",
            stacklevel=3,
        )


def _equal_texts(text: str, other: str) -> bool:
    """Return whether two texts are equal, apart from the form of accents (Unicode's NFC)."""
    return text == other or unicodedata.normalize("NFC", text) == unicodedata.normalize(
        "NFC", other
    )


def _drop_characters(pieces: list[str], length: int) -> list[str]:
    """Remove the first `length` characters of the joined pieces."""
    shorter = []
    for piece in pieces:
        shorter.append(piece[length:])
        length = max(0, length - len(piece))
    return shorter
