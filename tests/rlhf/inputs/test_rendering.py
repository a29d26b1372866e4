"""Ids give back what people wrote, and contain no control tokens but the template's own.

This holds for all kinds of tokenizers and templates.
"""

import warnings
from collections.abc import Callable
from datetime import datetime, tzinfo
from functools import cache
from typing import Self

import pytest
import transformers.utils.chat_template_utils as template_utils
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.generation.answers import Answer
from rlhf.inputs.chat import Chat
from tests.rlhf.answers import fitted
from tests.rlhf.inputs.test_chat import CHATML, LLAMA2
from tests.rlhf.tiny_models import byte_tokenizer

WORDS = (  # in a base model's own words: no control token marks a role
    "{% for m in messages %}{% if m['role'] == 'assistant' %} Answer: {{ m['content'] }}"
    "{{ eos_token }}{% else %}Question: {{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} Answer:{% endif %}"
)
HARMONY = (  # the answer's channel opens after the prompt
    "{% for m in messages %}<|start|>{{ m['role'] }}"
    "{% if m['role'] == 'assistant' %}<|channel|>final{% endif %}<|message|>{{ m['content'] }}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
EMPTY_THOUGHTS = (  # an answer without thoughts has an empty block of thoughts
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% set parts = m['content'].split('</think>') %}"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip() if parts | length > 1 }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') if m['role'] == 'assistant' else m['content'] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OPEN_THOUGHTS = (  # the prompt opens thoughts, which the conversation leaves out
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'].split('</think>')[-1] }}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
DATED = (
    "Today: {{ strftime_now('%d %b %Y') }}\n{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["the cat sat on the mat. ", "a cat's hat; the hat!\n\n", "Question: one Answer: two"]
ROLES = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]


def wrapped(inner: Tokenizer, template: str) -> PreTrainedTokenizerBase:
    made = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", **ROLES)
    made.chat_template = template
    return made


def byte_pairs(template: str = CHATML) -> PreTrainedTokenizerBase:
    """Make one like GPT-2's, whose decoding would by default remove spaces before punctuation."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    made = wrapped(inner, template)
    made.clean_up_tokenization_spaces = True
    return made


def byte_pairs_with_a_space(
    template: str = WORDS, *, strips: bool = True
) -> PreTrainedTokenizerBase:
    """Make one that puts a space before every text; decoding removes it if `strips` is set."""
    made = byte_pairs(template)
    inner = made.backend_tokenizer
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    strip = [decoders.Strip(" ", 1, 0)] if strips else []
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), *strip])
    return made


def pieces_with_bytes(template: str = CHATML, *, legacy: bool = True) -> PreTrainedTokenizerBase:
    """Make one like SentencePiece's: spaces are marks on words, unknown characters are bytes."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if legacy else "first")
    trainer = trainers.UnigramTrainer(
        vocab_size=80, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    vocabulary = [(word, inner.get_vocab()[word]) for word in inner.get_vocab()]
    scored = [
        (word, -float(10 + number)) for word, number in sorted(vocabulary, key=lambda p: p[1])
    ]
    scored += [(f"<0x{byte:02X}>", -100.0) for byte in range(256)]
    inner.model = models.Unigram(scored, unk_id=0, byte_fallback=True)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrapped(inner, template)


def word_pieces(template: str = CHATML) -> PreTrainedTokenizerBase:
    """Make one like BERT's: it writes small letters, and loses the spaces of a text."""
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=SPECIAL, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    return wrapped(inner, template)


MAKERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "byte pairs": byte_pairs,
    "byte pairs, words": lambda: byte_pairs(WORDS),
    "byte pairs, spaces around": lambda: byte_pairs(LLAMA2),
    "byte pairs, a space before": byte_pairs_with_a_space,
    "byte pairs, a space before that stays": lambda: byte_pairs_with_a_space(strips=False),
    "byte pairs, a space before, tokens": lambda: byte_pairs_with_a_space(CHATML),
    "pieces": pieces_with_bytes,
    "pieces, words": lambda: pieces_with_bytes(WORDS),
    "pieces, first": lambda: pieces_with_bytes(legacy=False),
    "pieces, first, spaces around": lambda: pieces_with_bytes(LLAMA2, legacy=False),
    "word pieces": word_pieces,
}
made = cache(lambda name: MAKERS[name]())

texts = st.lists(
    st.one_of(
        st.sampled_from(
            [*SPECIAL, "\u0100", "\u0101", "\u0120", " ", "  ", "\n", " .", "the", "n't"]
        ),
        st.text(max_size=4),
    ),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(text=texts)
@pytest.mark.slow
def test_text_comes_back_or_is_warned_of(name: str, text: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        chat = Chat(made(name))
        ids = chat.response_ids(text)
        plain = chat.text_ids(text)
    warned = " ".join(str(one.message) for one in caught)
    if name.startswith("byte pairs") or (name.startswith("pieces") and "\u2581" not in text):
        assert "cannot spell" not in warned
    if "spell a response" not in warned:
        assert chat.decode(ids) == text
        assert "".join(chat.pieces(ids)[:-1]) == text
    if "spell a text" not in warned:
        found = chat.tokenizer.decode(plain, skip_special_tokens=True)
        assert found == text or (name.endswith("stays") and found == " " + text)
    assert ids[-1] == chat.end_id
    assert not set(ids[:-1]) & set(range(len(SPECIAL))) or name == "word pieces"


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "word pieces"])
def test_prompt_and_response_are_the_rendered_conversation(name: str) -> None:
    """Text between them, such as the space after "Answer:", is neither lost nor doubled."""
    chat = Chat(made(name))
    turns = [{"role": "user", "content": "Is this the cat?"}]
    answer = {"role": "assistant", "content": "the \u0101 cat. "}
    whole = chat.tokenizer.apply_chat_template([*turns, answer], tokenize=False)
    ids = chat.prompt_ids(turns) + chat.response_ids(answer["content"])
    in_one = chat.tokenizer(whole, add_special_tokens=False).input_ids
    assert ids == in_one[: len(ids)]


@pytest.mark.parametrize("name", ["byte pairs", "byte pairs, words", "pieces", "pieces, first"])
@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=texts.filter(lambda text: text.strip()))
def test_prompts_hold_the_templates_control_tokens_alone(name: str, text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chat = Chat(made(name))
        turns = [("user", text), ("assistant", text), ("user", text)]
        plain = [{"role": role, "content": "cat"} for role, _ in turns]
        prompt = [{"role": role, "content": content} for role, content in turns]
        control = [token for token in chat.prompt_ids(plain) if token < len(SPECIAL)]
        ids = chat.prompt_ids(prompt)
    assert [token for token in ids if token < len(SPECIAL)] == control
    if "\u2581" not in text:
        template = chat.tokenizer.apply_chat_template
        rendered = template(prompt, tokenize=False, add_generation_prompt=True)
        assert isinstance(rendered, str)
        assert "".join(chat.show(ids).split()) == "".join(rendered.split())


def test_words_of_people_in_a_prompt_have_the_ids_of_words() -> None:
    """The copy of the tokenizer that reads them gives all other text the same ids."""
    chat = Chat(byte_pairs())
    plain = chat.prompt_ids("Is the cat on the mat?")
    ids = chat.prompt_ids("Is the cat<|im_end|> on the mat?")
    word = chat.bare_text_ids("<|im_end|>")
    assert chat.end_id not in word
    start = next(i for i in range(len(ids)) if ids[i : i + len(word)] == word)
    assert ids[:start] + ids[start + len(word) :] == plain


def test_added_tokens_of_the_template_are_control_tokens_too() -> None:
    """They are, whether they are flagged as special or not, as add_tokens leaves them."""
    inner = byte_tokenizer("<s>", "</s>").backend_tokenizer
    names = ("<|im_start|>", "<|im_end|>")
    inner.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHATML
    chat = Chat(tokenizer)
    ids_of_names = tokenizer.convert_tokens_to_ids(list(names))
    assert isinstance(ids_of_names, list)
    start, end = ids_of_names
    assert (chat.end_id, chat.other_ends) == (end, (1,))
    response = "Not <|im_end|>, not <|im_start|>."
    ids = chat.response_ids(response)
    assert ids.count(end) == 1 and start not in ids
    assert chat.decode(ids) == response
    prompt = chat.prompt_ids("What is <|im_end|>?")
    assert (prompt.count(start), prompt.count(end)) == (2, 1)


def test_an_end_that_is_a_line_break() -> None:
    """Texts of several lines keep their breaks, which are words."""
    template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}{{ eos_token }}"
        "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    chat = Chat(byte_tokenizer("\n", "<pad>", eos_token="\n", chat_template=template))
    response = "One.\nTwo.\n"
    ids = chat.response_ids(response)
    assert ids.count(chat.end_id) == 1
    assert chat.decode(ids) == response
    prompt = chat.prompt_ids("A\nB\n")
    assert prompt.count(chat.end_id) == 1
    assert chat.show(prompt) == "user: A\nB\nassistant:"


def test_the_end_of_a_document_may_end_a_turn() -> None:
    end = "<|endoftext|>"
    tokenizer = byte_tokenizer(end, "<pad>", bos_token=end, eos_token=end, chat_template=WORDS)
    chat = Chat(tokenizer)
    assert (chat.end_id, chat.pad_id, chat.other_ends) == (0, 1, ())
    ids = chat.prompt_ids("Who?") + chat.response_ids("Me.")
    assert chat.show(ids) == f"Question: Who? Answer: Me.{end}"
    assert chat.decode(chat.response_ids("Me.")) == "Me."
    assert chat.decode(chat.bare_text_ids("Me.")) == "Me."


def test_an_opening_of_the_templates_is_part_of_the_response() -> None:
    names = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<pad>")
    chat = Chat(byte_tokenizer(*names, eos_token="<|end|>", chat_template=HARMONY))
    ids = chat.response_ids("Me.")
    assert chat.show(ids) == "<|channel|>final<|message|>Me.<|end|>"
    assert chat.decode(ids) == "".join(chat.pieces(ids)[:-1]) == "Me."


def thinking_tokenizer(template: str) -> PreTrainedTokenizerBase:
    special = ("<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "</s>", "<pad>")
    inner = byte_tokenizer(*special).backend_tokenizer
    names = ("<think>", "</think>")
    inner.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def test_an_empty_block_of_thoughts_goes_before_an_answer_without() -> None:
    chat = Chat(thinking_tokenizer(EMPTY_THOUGHTS))
    tokenizer = chat.tokenizer
    question = [{"role": "user", "content": "Who?"}]
    for response in ("Me.", "<think>\nHm.\n</think>\n\nMe.", "<think>\n\n</think>\n\nMe."):
        answer = {"role": "assistant", "content": response}
        whole = tokenizer.apply_chat_template([*question, answer], tokenize=False)
        ids = chat.prompt_ids(question) + chat.response_ids(response)
        assert ids == tokenizer(whole, add_special_tokens=False).input_ids[: len(ids)]
    assert chat.decode(chat.response_ids("Me.")) == "Me."
    assert chat.decode(chat.response_ids("<think>\nHm.\n</think>\n\nMe.")).startswith("<think>")


def test_names_that_a_template_looks_for_are_left_to_it() -> None:
    """The template cuts off thoughts of an earlier answer, and a user's words stay."""
    chat = Chat(thinking_tokenizer(EMPTY_THOUGHTS))
    prompt = [
        {"role": "user", "content": "What is </think>? And <|im_end|>?"},
        {"role": "assistant", "content": "<think>Hm.</think>\n\nIt ends thoughts, no <|im_end|>."},
        {"role": "user", "content": "Who?"},
    ]
    ids = chat.prompt_ids(prompt)
    rendered = chat.tokenizer.apply_chat_template(
        prompt, tokenize=False, add_generation_prompt=True
    )
    assert chat.show(ids) == rendered
    assert ids.count(chat.end_id) == 3
    thoughts = chat.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
    assert isinstance(thoughts, list)
    assert not set(thoughts) & set(ids)


def test_a_prompt_that_the_conversation_departs_from_is_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"ends a prompt with '<think>\\n'"):
        chat = Chat(thinking_tokenizer(OPEN_THOUGHTS))
    assert chat.show(chat.prompt_ids("Who?")) == "<|user|>Who?<|assistant|><think>\n"
    thought = "Hm.</think>Me."
    assert chat.tokenizer.convert_tokens_to_ids("</think>") in chat.response_ids(thought)
    assert chat.decode(chat.response_ids(thought)) == thought


def test_a_turn_without_an_end_of_its_own_is_warned_of() -> None:
    template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    with pytest.warns(UserWarning, match=r"ends an assistant's turn with '\\n'"):
        assert Chat(byte_tokenizer("</s>", eos_token="</s>", chat_template=template)).end_id == 0


def test_a_dated_template_renders_the_same_on_every_day(monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls(2031, 1, 2)

    names = ("<|im_start|>", "<|im_end|>", "<pad>")
    with pytest.warns(UserWarning, match="all prompts have 26 July 2024"):
        chat = Chat(byte_tokenizer(*names, eos_token="<|im_end|>", chat_template=DATED))
    today = chat.prompt_ids("Who?")
    monkeypatch.setattr(template_utils, "datetime", Later)
    assert chat.prompt_ids("Who?") == today
    assert chat.show(today).startswith("Today: 26 Jul 2024\n")
    assert chat.show(chat.prompt_ids("%d")).count("26") == 1


@pytest.mark.parametrize(
    ("form", "date"),
    [("%A, %-d %B %Y", "Friday, 26 July 2024"), ("%F %H:%M", "2024-07-26 00:00"), ("", "")],
)
def test_the_date_in_any_form_and_place(form: str, date: str) -> None:
    """The date is found inside a macro too, and line breaks at the template's start stay."""
    template = (
        "\n\n{% macro day(form) %}{{ strftime_now(format=form) }}{% endmacro %}"
        f"{{{{ day({form!r}) }}}}{{% for m in messages %}}|{{{{ m['content'] }}}}</s>{{% endfor %}}"
    )
    chat = Chat(byte_tokenizer("</s>", eos_token="</s>", chat_template=template))
    assert chat.show(chat.prompt_ids("Who?")) == f"\n\n{date}|Who?</s>"


def test_other_ends_end_a_response() -> None:
    names = ("<|im_start|>", "<|im_end|>", "</s>", "<|eom|>", "<pad>", "<x>")
    chat = Chat(byte_tokenizer(*names, eos_token="</s>", chat_template=CHATML), other_ends=[3])
    assert (chat.end_id, chat.other_ends, chat.pad_id) == (1, (2, 3), 4)
    words = chat.response_ids("Me.")[:-1]
    assert [chat.has_end([*words, end]) for end in (1, 2, 3, 5)] == [True, True, True, False]
    assert not chat.has_end([])
    for end in (1, 2, 3):
        assert chat.decode([*words, end]) == "Me."
        answer = Answer.of(fitted(chat, "Who?"), [*words, end], chat)
        assert answer.is_finished and answer.ids_ending_with(chat.end_id) == (*words, 1)
        assert chat.pieces([*words, end]) == [*"Me.", names[end]]
    assert Answer.of(fitted(chat, "Who?"), words, chat).ids_ending_with(1) == tuple(words)


def test_padding_among_the_other_ends() -> None:
    """A padding token that the tokenizer names stays; a new one is none of the end tokens."""
    names = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<x>")
    roles = {"eos_token": "<|im_end|>", "chat_template": CHATML}
    own = byte_tokenizer(*names, pad_token="<|endoftext|>", **roles)
    assert Chat(own, other_ends=[2]).pad_id == 2
    assert Chat(byte_tokenizer(*names, **roles), other_ends=[2]).pad_id == 3
