"""The one rendering of prompts and responses to token ids, used by every stage.

A prompt becomes ids through the tokenizer's chat template with the generation prompt added; a
response becomes its own ids followed by the end-of-response token. The two lists are concatenated,
never re-tokenised together, so SFT, the reward model, PPO and evaluation see the same ids.
"""

import hashlib
from collections.abc import Sequence
from functools import cached_property

from jinja2.exceptions import TemplateError
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerBase

from rlhf.records import Messages, PromptLike, to_messages

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant:\n{{ message['content'] }}{{ eos_token }}\n"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}User:\n{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Given to tokenizers that have none: role names as plain text, no new tokens, so that no
vocabulary has to grow. The line break before a response keeps its first token free of a space."""

_PROBE = "probe"


def add_missing_parts(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Gives a tokenizer a chat template and a padding token that training never needs to predict.

    A sequence classifier of transformers reads its score at the last token that is not padding,
    so a padding token equal to the end of a response would move that score one token early. The
    vocabulary does not grow: an existing special token is taken, else one that text never gives.

    Raises:
        ValueError: the tokenizer has no vocabulary or no end-of-sequence token.
    """
    if not tokenizer(_PROBE, add_special_tokens=False).input_ids:
        raise ValueError(
            f"the tokenizer at {tokenizer.name_or_path!r} gives no tokens for a word, so its "
            "vocabulary is missing; save the tokenizer (tokenizer.json) beside the weights"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer at {tokenizer.name_or_path!r} has no end-of-sequence token, and "
            "responses must end with one; set eos_token in its tokenizer_config.json"
        )
    if isinstance(tokenizer.chat_template, dict):
        tokenizer.chat_template = _default_template(tokenizer)
    if not tokenizer.chat_template:
        start = "{{ bos_token }}" if _adds_bos(tokenizer) else ""
        tokenizer.chat_template = start + DEFAULT_CHAT_TEMPLATE
    end_ids = {tokenizer.eos_token_id, _end_id(tokenizer)}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in end_ids:
        tokenizer.add_special_tokens({"pad_token": _unused_token(tokenizer, end_ids)})
    return tokenizer


class Chat:
    """Renders prompts and responses with one tokenizer.

    Attributes:
        end_id: the token that ends a response: what the template puts after an assistant's words
            if that is a special token, else the tokenizer's end-of-sequence token.
        pad_id: the padding token; masks never depend on it, they come from lengths.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = add_missing_parts(tokenizer)
        self.end_id: int = _end_id(tokenizer)
        self.pad_id: int = tokenizer.pad_token_id

    def prompt_ids(self, prompt: PromptLike) -> list[int]:
        """Token ids of a prompt, up to and including the template's generation prompt."""
        text = _render(self.tokenizer, to_messages(prompt), add_generation_prompt=True)
        return self._encode(text)

    def response_ids(self, response: str) -> list[int]:
        """Token ids of a response and, always last, the end-of-response token.

        Words like "</s>" in the response stay words: no end token stands before the end.
        """
        return [*self._encode(response, split_special_tokens=True), self.end_id]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text (no template), with the tokenizer's own special tokens."""
        return self.tokenizer(text).input_ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of response ids, cut before the end token, special tokens dropped."""
        ids = list(ids)
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str)
        return text

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text that each token of a response adds; the end token adds its own name.

        Without the end token's, the pieces joined are `decode` of the ids. A character that several
        tokens spell comes whole with the last of them, and the others add nothing; so do special
        tokens within the response. The tokens since the last whole character are decoded together
        with those before them, since what a token reads as may depend on its neighbours.
        """
        ids = list(ids)
        end = ids.index(self.end_id) if self.end_id in ids else len(ids)
        pieces = []
        first, whole = 0, 0  # ids[first:whole] are context, all before `whole` is in the pieces
        for stop in range(1, end + 1):
            known, text = self.decode(ids[first:whole]), self.decode(ids[first:stop])
            if text.endswith("\ufffd") and stop < end:
                pieces.append("")
                continue
            pieces.append(text[len(known) :])
            if pieces[-1]:
                first = whole  # else the context would be without text, like the start of one
            whole = stop
        return [*pieces, *self.tokenizer.convert_ids_to_tokens(ids[end:])]

    def fit_prompt(self, prompt: PromptLike, max_tokens: int) -> list[int] | None:
        """The prompt's ids with the oldest turns left out until they fit, or None.

        Turns are dropped whole from the front, a system message stays, and the first turn kept is
        a user's: a prompt cut inside a sentence would be another task. None means that the last
        turn alone is too long; the caller counts and reports these.
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

    def _encode(self, text: str, *, split_special_tokens: bool = False) -> list[int]:
        return self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=split_special_tokens
        ).input_ids


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:  # a template is a program of its own, which may fail in any way
        roles = ", ".join(message["role"] for message in messages)
        name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise ValueError(
            f"the chat template refuses a prompt with the turns {roles}: {name}{error}; change the "
            "prompt or the chat template of the tokenizer"
        ) from error
    assert isinstance(text, str)
    return text


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Of several templates the one that all prompts are rendered with, so the only one to save."""
    templates = tokenizer.chat_template
    if "default" not in templates:
        raise ValueError(
            f"the tokenizer at {tokenizer.name_or_path!r} has several chat templates "
            f"({', '.join(templates)}) and none is named default; leave one in its "
            "chat_template.jinja"
        )
    return templates["default"]


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer(_PROBE).input_ids[0] == bos


def _end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The first special token that the template writes after an assistant message, else EOS."""
    question: Messages = [{"role": "user", "content": _PROBE}]
    answer = {"role": "assistant", "content": _PROBE}
    text = _render(tokenizer, [*question, answer], add_generation_prompt=False)
    if text.count(_PROBE) < 2:
        raise ValueError(
            f"the chat template of the tokenizer at {tokenizer.name_or_path!r} leaves out what the "
            "assistant said, so no response could end; change the template"
        )
    tail = tokenizer(text[text.rindex(_PROBE) + len(_PROBE) :], add_special_tokens=False).input_ids
    special = {tokenizer.convert_tokens_to_ids(token) for token in _special_tokens(tokenizer)}
    return next((token for token in tail if token in special), tokenizer.eos_token_id)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """All special tokens; those without a role, such as Phi's <|end|>, are in no other list."""
    added = tokenizer.added_tokens_decoder.values()
    without_role = [token.content for token in added if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *without_role]))


def _unused_token(tokenizer: PreTrainedTokenizerBase, end_ids: set[int]) -> AddedToken:
    """A token that no response ends with: a special one, else the one for the NUL character."""
    special = _special_tokens(tokenizer)
    made_for_it = [token for token in special if "pad" in token]
    for token in [*made_for_it, tokenizer.unk_token, tokenizer.bos_token, *special]:
        if token and tokenizer.convert_tokens_to_ids(token) not in end_ids:
            return AddedToken(token, special=True, normalized=False)
    nul = tokenizer("\x00", add_special_tokens=False).input_ids
    if len(nul) == 1 and nul[0] not in end_ids:
        # A byte-level tokenizer writes NUL as the letter A with macron. As a special token that
        # would swallow the letter itself in every word, unless it must stand as a word alone.
        name = tokenizer.convert_ids_to_tokens(nul[0])
        assert isinstance(name, str)
        return AddedToken(name, single_word=True, special=True, normalized=False)
    raise ValueError(
        f"no padding token distinct from the end token {tokenizer.eos_token!r} was found in the "
        f"tokenizer at {tokenizer.name_or_path!r}; set pad_token in its tokenizer_config.json"
    )
