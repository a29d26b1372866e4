"""Finds what a chat template writes around prompts and answers, and adds what a tokenizer lacks."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf.inputs.records import Messages

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}Assistant:\n{{ message['content'] }}{{ eos_token }}\n"
    "{% elif message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}User:\n{{ message['content'] }}\n\n{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)
"""Template for tokenizers that have none. Role names are plain text, so that the vocabulary need
not grow. The line break before a response keeps its first token free of a space."""

DATE = datetime(2024, 7, 26)
"""The date that `strftime_now` prints in every template, which is the default of Llama 3.1's. With
today's date, prompts would differ after midnight, in a resumed run, or for a reward model trained
yesterday."""

PROBE = "probe"


def _date_macro(date: datetime) -> str:
    """Return code that makes `strftime_now` in a template give this date; it prints nothing."""
    long = {"D": "%m/%d/%y", "F": "%Y-%m-%d", "R": "%H:%M", "T": "%H:%M:%S", "e": "%d", "h": "%b"}
    directives = {letter: f"%{letter}" for letter in "aAbBcdHIjmMpSUwWxXyYzZ"} | long
    values = {f"%{letter}": date.strftime(form) for letter, form in directives.items()}
    values |= {f"%-{key[1]}": value.lstrip("0") or "0" for key, value in values.items()}
    filters = "".join(f" | replace({key!r}, {value!r})" for key, value in values.items())
    # The empty text at the end keeps white space at the start of the template.
    return "{% macro strftime_now(format) %}{{ format" + filters + ' }}{% endmacro %}{{ "" }}'


_DATE_MACRO = _date_macro(DATE)

_RARE_CHARACTERS = "\u2603\U0001f600\u4e2d\x07"
"""Characters that a vocabulary of words maps to its unknown token."""


@dataclass(frozen=True, kw_only=True)
class AnswerFrame:
    """The text and tokens that a template writes around an answer."""

    end_id: int
    """The token that ends an assistant's turn."""
    before: str
    """Text from the end of the question to the end of the prompt."""
    opening: str
    """Text between the prompt and the answer, such as a space or an empty block of thoughts."""
    closing: str
    """Text between the answer and the end token."""
    turn_names: frozenset[str]
    """Names of the control tokens that mark or end turns. No response holds one."""
    control_names: frozenset[str]
    """The turn names, all special tokens, and other added tokens that the template uses, such as
    thought markers."""
    differences: tuple[str, ...]
    """Descriptions of where the ids differ from what the template renders for a conversation."""


def add_missing_parts(
    tokenizer: PreTrainedTokenizerBase, other_ends: Iterable[int] = ()
) -> PreTrainedTokenizerBase:
    """Give a tokenizer a chat template, and a padding token that no row holds, if there is one.

    A token that ends responses or occurs in prompts cannot pad, for two reasons. A sequence
    classifier of transformers reads its score at the last token that is not padding. `generate`
    without a mask ignores padding. The vocabulary does not grow: another special token is taken, or
    the tokenizer has no padding token. Decoding keeps spaces before punctuation.

    Args:
        other_ends: Tokens that end a response, besides the tokenizer's and the template's. One that
            the tokenizer already pads with stays its padding token, as in Qwen2.5.

    Raises:
        ValueError: The tokenizer has no vocabulary or no end-of-sequence token.
    """
    if not _ids(tokenizer, PROBE):
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
    tokenizer.clean_up_tokenization_spaces = False
    taken = {tokenizer.eos_token_id, _end_of(tokenizer)[0], *_used_ids(tokenizer)}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in taken:
        tokenizer.pad_token = _unused_token(tokenizer, taken | {*other_ends})
    return tokenizer


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, *, add_generation_prompt: bool
) -> str:
    """Render messages with the template, on one date (see DATE).

    Raises:
        ValueError: The template refuses the messages.
    """
    template = tokenizer.chat_template
    if prints_date(tokenizer):
        template = _DATE_MACRO + template
    try:
        text = tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a program, which may fail in any way
        roles = ", ".join(message["role"] for message in messages)
        name = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
        raise ValueError(
            f"the chat template refuses a prompt with the turns {roles}: {name}{error}; change the "
            "prompt or the chat template of the tokenizer"
        ) from error
    assert isinstance(text, str)
    return text


def prints_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    return "strftime_now" in str(tokenizer.chat_template)


def find_answer_frame(tokenizer: PreTrainedTokenizerBase) -> AnswerFrame:
    """Find the template's AnswerFrame. Warn if the template prints the date."""
    prompt = render(tokenizer, [_turn("user")], add_generation_prompt=True)
    whole = render(tokenizer, [_turn("user"), _turn("assistant")], add_generation_prompt=False)
    answer = whole.rindex(PROBE)
    end_id, closing = _end_of(tokenizer)
    differences = []
    opening = ""
    if whole.startswith(prompt) and len(prompt) <= answer:
        opening = whole[len(prompt) : answer]
    else:
        same = _length_of_common_start(prompt, whole[:answer])
        differences.append(
            f"the chat template ends a prompt with {prompt[same:]!r}, and a whole conversation has "
            f"{whole[same:answer]!r} there; responses are trained and sampled after the prompt, so "
            "begin them with what belongs there, or change the template"
        )
    tail = whole[answer + len(PROBE) :]
    if tail and end_id not in _ids(tokenizer, tail):
        differences.append(
            f"the chat template ends an assistant's turn with {tail!r}, which is not a token "
            f"of its own; a response ends with {tokenizer.eos_token!r} instead"
        )
    if prints_date(tokenizer):
        warnings.warn(
            f"the chat template prints the date; all prompts have {DATE:%d %B %Y}, so that they "
            "are the same on every day",
            stacklevel=3,
        )
    names = _added_names(tokenizer)
    special = frozenset(_special_tokens(tokenizer))
    history = _conversation(tokenizer, add_generation_prompt=False)
    in_prompts = _conversation(tokenizer, add_generation_prompt=True)
    template = str(tokenizer.chat_template)
    return AnswerFrame(
        end_id=end_id,
        before=prompt[prompt.rindex(PROBE) + len(PROBE) :] if PROBE in prompt else "",
        opening=opening,
        closing=closing,
        turn_names=special
        | _names_in(tokenizer, history, names)
        | {str(tokenizer.convert_ids_to_tokens(end_id))},
        control_names=special
        | _names_in(tokenizer, in_prompts + whole, names)
        | {name for name in names if name in template and not _is_word(name)},
        differences=tuple(differences),
    )


def _end_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, str]:
    """Return the first control token after an assistant's words, and the text before it.

    Return EOS if the template writes none."""
    whole = render(tokenizer, [_turn("user"), _turn("assistant")], add_generation_prompt=False)
    if whole.count(PROBE) < 2:
        raise ValueError(
            f"the chat template of the tokenizer at {tokenizer.name_or_path!r} leaves out what the "
            "assistant said, so no response could end; change the template"
        )
    tail = whole[whole.rindex(PROBE) + len(PROBE) :]
    special = {tokenizer.convert_tokens_to_ids(token) for token in _special_tokens(tokenizer)}
    added = {
        i for i, token in tokenizer.added_tokens_decoder.items() if not _is_word(token.content)
    }
    for token in _ids(tokenizer, tail):
        if token in special | added:
            closing, name, _ = tail.partition(str(tokenizer.convert_ids_to_tokens(token)))
            return token, closing if name else ""
    return tokenizer.eos_token_id, ""


def _turn(role: str) -> dict[str, str]:
    return {"role": role, "content": PROBE}


def _conversation(tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool) -> str:
    """Render a question, its answer and a second question, after a system turn if allowed."""
    turns = [_turn("user"), _turn("assistant"), _turn("user")]
    for messages in ([_turn("system"), *turns], turns):
        try:
            return render(tokenizer, messages, add_generation_prompt=add_generation_prompt)
        except ValueError:
            continue
    return render(tokenizer, [_turn("user")], add_generation_prompt=add_generation_prompt)


def _length_of_common_start(first: str, second: str) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _names_in(tokenizer: PreTrainedTokenizerBase, text: str, names: Iterable[str]) -> set[str]:
    """Return the added tokens in a rendered text, except words."""
    found = set(_ids(tokenizer, text))
    return {
        name
        for name in names
        if not _is_word(name) and tokenizer.convert_tokens_to_ids(name) in found
    }


def _is_word(name: str) -> bool:
    """Return whether an added token is a word or white space."""
    return name.isalnum() or name.isspace()


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=False).input_ids


def _default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template named default, which renders all prompts and is the one to save."""
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
    return bos is not None and tokenizer(PROBE).input_ids[0] == bos


def _added_names(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values()]


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return all special tokens, also those without a role, such as Phi's <|end|>."""
    added = tokenizer.added_tokens_decoder.values()
    without_role = [token.content for token in added if token.special]
    return list(dict.fromkeys([*tokenizer.all_special_tokens, *without_role]))


def _used_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids in a prompt, a text and characters that the vocabulary lacks."""
    prompt = _conversation(tokenizer, add_generation_prompt=True)
    return {
        *_ids(tokenizer, prompt),
        *tokenizer(PROBE).input_ids,
        *_ids(tokenizer, _RARE_CHARACTERS),
    }


def _unused_token(tokenizer: PreTrainedTokenizerBase, taken: set[int]) -> str | None:
    """Return a special token that can pad: one named pad first, and BOS last, as it joins texts."""
    names = [name for name in _added_names(tokenizer) if not _is_word(name)]
    made_for_it = [name for name in names if "pad" in name.lower()]
    special = _special_tokens(tokenizer)
    others = [name for name in special if name != tokenizer.bos_token]
    for name in [*made_for_it, *others, tokenizer.bos_token]:
        if name and tokenizer.convert_tokens_to_ids(name) not in taken:
            return name
    return None
