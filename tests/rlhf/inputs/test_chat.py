"""Tests the rendering of all stages: templates, end and padding tokens, prompts that fit."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.inputs.chat import Chat
from rlhf.inputs.template import DEFAULT_CHAT_TEMPLATE, add_missing_parts
from tests.rlhf.tiny_models import byte_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<s>[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'system' %}{{ raise_exception('no system role') }}"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)

BOS = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}\n{% endfor %}"

CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello?"},
    {"role": "assistant", "content": "Yes."},
    {"role": "user", "content": "Who?"},
]


def gpt2_like() -> PreTrainedTokenizerBase:
    end = "<|endoftext|>"
    return byte_tokenizer(end, bos_token=end, eos_token=end, unk_token=end)


def text_of(chat: Chat, ids: list[int]) -> str:
    text = chat.tokenizer.decode(ids, skip_special_tokens=False)
    assert isinstance(text, str)
    return text


def ids_of(chat: Chat, text: str) -> list[int]:
    return chat.tokenizer(text, add_special_tokens=False).input_ids


def test_own_template_when_there_is_none() -> None:
    chat = Chat(byte_tokenizer("</s>", "<pad>", eos_token="</s>", pad_token="<pad>"))
    assert chat.tokenizer.chat_template == DEFAULT_CHAT_TEMPLATE
    assert text_of(chat, chat.prompt_ids("Who?")) == "User:\nWho?\n\nAssistant:\n"
    assert text_of(chat, chat.prompt_ids(CONVERSATION)) == (
        "Be kind.\n\nUser:\nHello?\n\nAssistant:\nYes.</s>\nUser:\nWho?\n\nAssistant:\n"
    )


def test_own_template_starts_as_the_tokenizer_does() -> None:
    tokenizer = byte_tokenizer("<s>", "</s>", bos_token="<s>", eos_token="</s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    chat = Chat(tokenizer)
    assert text_of(chat, chat.prompt_ids("Who?")) == "<s>User:\nWho?\n\nAssistant:\n"
    assert text_of(chat, chat.text_ids("plain")) == "<s>plain"
    assert text_of(chat, chat.response_ids("Me.")) == "Me.</s>"


def test_tokenizers_own_template_wins() -> None:
    tokenizer = byte_tokenizer("<|im_end|>", "<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    chat = Chat(tokenizer)
    assert tokenizer.chat_template == CHATML
    assert text_of(chat, chat.prompt_ids("Who?")) == (
        "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("template", [None, CHATML, PHI], ids=["own", "chatml", "phi"])
def test_prompt_and_response_concatenate_to_the_rendered_conversation(template: str | None) -> None:
    """Both together are the ids of the whole conversation, up to the end token."""
    special = ("<eos>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|user|>", "<|assistant|>")
    tokenizer = byte_tokenizer(*special, eos_token="<eos>", chat_template=template)
    chat = Chat(tokenizer)
    answer = {"role": "assistant", "content": "Me, Ā and ąß: 你好 🙂"}
    messages = [{"role": "user", "content": "Who?\n\nReally?"}]
    whole = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    assert isinstance(whole, str)
    ids = chat.prompt_ids(messages) + chat.response_ids(answer["content"])
    assert ids == ids_of(chat, whole)[: len(ids)]
    assert chat.decode(chat.response_ids(answer["content"])) == answer["content"]


@pytest.mark.parametrize(
    ("template", "end"),
    [(None, "<eos>"), (CHATML, "<|im_end|>"), (PHI, "<|end|>"), (LLAMA2, "</s>")],
    ids=["own", "chatml", "phi", "llama2"],
)
def test_end_token_is_the_templates(template: str | None, end: str) -> None:
    """The end token is found even if it is only among the added tokens, as in Phi's tokenizer."""
    special = ["<eos>", "<|im_start|>", "<|im_end|>", "<|end|>", "<s>", "</s>"]
    eos = "</s>" if template == LLAMA2 else "<eos>"
    chat = Chat(byte_tokenizer(*special, eos_token=eos, chat_template=template))
    assert chat.end_id == special.index(end)
    space = " " if template == LLAMA2 else ""
    assert chat.response_ids("Me.") == [*ids_of(chat, f"{space}Me.{space}"), chat.end_id]
    assert chat.response_ids("") == [*ids_of(chat, space + space), chat.end_id]
    assert chat.pad_id not in (chat.end_id, special.index(eos))


def test_words_that_look_like_special_tokens_stay_words() -> None:
    special = ["<eos>", "<|im_start|>", "<|im_end|>"]
    chat = Chat(byte_tokenizer(*special, eos_token="<eos>", chat_template=CHATML))
    response = "Write <|im_end|> or <eos>, then stop."
    ids = chat.response_ids(response)
    assert ids.count(chat.end_id) == 1
    assert 0 not in ids
    assert chat.decode(ids) == response


TOKENIZERS_WITHOUT_PAD = {
    "bos and no pad": lambda: byte_tokenizer("<s>", "</s>", bos_token="<s>", eos_token="</s>"),
    "unk and no pad": lambda: byte_tokenizer("<unk>", "</s>", unk_token="<unk>", eos_token="</s>"),
    "pad is eos": lambda: byte_tokenizer("<s>", "</s>", eos_token="</s>", pad_token="</s>"),
    "pad without a role": lambda: byte_tokenizer("<a>", "<|pad|>", "</s>", eos_token="</s>"),
    "bos in prompts": lambda: byte_tokenizer(
        "<s>", "<a>", "</s>", bos_token="<s>", eos_token="</s>", pad_token="<s>", chat_template=BOS
    ),
    "pad is the template's end": lambda: byte_tokenizer(
        "<eos>",
        "<|im_end|>",
        "<|im_start|>",
        "<a>",
        eos_token="<eos>",
        pad_token="<|im_end|>",
        chat_template=CHATML,
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS_WITHOUT_PAD)
def test_pad_is_never_an_end_token(name: str, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS_WITHOUT_PAD[name]()
    size = len(tokenizer)
    chat = Chat(tokenizer)
    assert chat.pad_id is not None and 0 <= chat.pad_id < size
    assert chat.pad_id not in (chat.end_id, tokenizer.eos_token_id)
    assert chat.pad_id not in chat.prompt_ids(CONVERSATION) + chat.text_ids("plain")
    assert len(tokenizer) == size, "the vocabulary must not grow"

    tokenizer.save_pretrained(tmp_path)
    loaded = Chat(AutoTokenizer.from_pretrained(tmp_path))
    assert (loaded.pad_id, loaded.end_id) == (chat.pad_id, chat.end_id)
    assert len(loaded.tokenizer) == size
    assert loaded.prompt_ids(CONVERSATION) == chat.prompt_ids(CONVERSATION)


def test_a_token_made_for_padding_is_preferred() -> None:
    tokenizer = add_missing_parts(TOKENIZERS_WITHOUT_PAD["pad without a role"]())
    assert tokenizer.pad_token == "<|pad|>"


TOKENIZERS_WITHOUT_A_SPARE_TOKEN = {
    "one special token": gpt2_like,
    "one that is pad too": lambda: byte_tokenizer("<e>", eos_token="<e>", pad_token="<e>"),
    "all in turns": lambda: byte_tokenizer(
        *("<eos>", "<|im_end|>", "<|im_start|>"), eos_token="<eos>", chat_template=CHATML
    ),
    "all in prompts": lambda: byte_tokenizer(
        "<s>", "</s>", bos_token="<s>", eos_token="</s>", pad_token="<s>", chat_template=BOS
    ),
}


@pytest.mark.parametrize("name", TOKENIZERS_WITHOUT_A_SPARE_TOKEN)
def test_no_padding_token_where_none_is_to_spare(name: str, tmp_path: Path) -> None:
    """Neither a letter nor a token of prompts becomes the padding token."""
    text = "Ā bols, BAĀBA, kā pt, Ġ and ā: ordinary words"
    chat = Chat(TOKENIZERS_WITHOUT_A_SPARE_TOKEN[name]())
    chat.tokenizer.save_pretrained(tmp_path)
    for version in (chat, Chat(AutoTokenizer.from_pretrained(tmp_path))):
        assert version.pad_id is None
        assert version.decode(version.response_ids(text)) == text
        assert text in text_of(version, version.prompt_ids(text))
        assert version.decode(version.text_ids(text)) == text


def test_a_token_that_unknown_letters_become_does_not_pad() -> None:
    chat = Chat(word_tokenizer("<unk>", "</s>", unk_token="<unk>", eos_token="</s>"))
    assert chat.pad_id is None


def test_keeps_a_good_pad() -> None:
    tokenizer = byte_tokenizer("<x>", "</s>", "<p>", eos_token="</s>", pad_token="<p>")
    assert Chat(tokenizer).pad_id == 2


def test_refuses_a_tokenizer_without_end() -> None:
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        add_missing_parts(byte_tokenizer("<s>", bos_token="<s>"))


def test_decode_cuts_at_the_end_token() -> None:
    chat = Chat(gpt2_like())
    ids = chat.response_ids("Me.") + chat.response_ids("And more.")
    assert chat.decode(ids) == "Me."
    assert chat.decode(ids_of(chat, "Not finis")) == "Not finis"
    assert chat.decode([chat.end_id]) == ""
    assert chat.decode([]) == ""


def metaspace_tokenizer() -> PreTrainedTokenizerBase:
    """Make one like SentencePiece's: a space joins the next word, and no text starts with one."""
    words = ["<unk>", "</s>", "<pad>", "\u2581the", "\u2581cat", "s", ".", "\u2581"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>"
    )


def word_tokenizer(*words: str, **roles: str) -> PreTrainedTokenizerBase:
    """Make a tokenizer to which every other word is unknown."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)


def test_pieces_are_what_each_token_adds() -> None:
    chat = Chat(byte_tokenizer("</s>", "<pad>", eos_token="</s>", pad_token="<pad>"))
    assert chat.pieces(chat.response_ids("a \u00e9!")) == ["a", " ", "", "\u00e9", "!", "</s>"]
    whole = chat.response_ids("\U0001f600")[:-1]
    assert chat.pieces(whole) == ["", "", "", "\U0001f600"]
    assert chat.pieces(whole[:2]) == ["", "\ufffd"]
    assert chat.pieces([1, *whole, 1]) == ["", "", "", "", "\U0001f600", ""]
    assert chat.pieces([]) == []
    assert Chat(metaspace_tokenizer()).pieces([3, 4, 5, 6, 3, 1]) == [
        *("the", " cat", "s", ".", " the"),
        "</s>",
    ]


@pytest.mark.parametrize("make", [gpt2_like, metaspace_tokenizer])
def test_pieces_joined_are_the_decoded_text(make: Callable[[], PreTrainedTokenizerBase]) -> None:
    chat = Chat(make())
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.randrange(len(chat.tokenizer)) for _ in range(rng.randrange(12))]
        ids = [token for token in ids if token != chat.end_id]
        pieces = chat.pieces(ids)
        assert len(pieces) == len(ids)
        assert "".join(pieces) == chat.decode(ids)


def test_refused_roles_are_named() -> None:
    chat = Chat(byte_tokenizer("<s>", "</s>", eos_token="</s>", chat_template=LLAMA2))
    with pytest.raises(ValueError, match=r"system, user, assistant, user: no system role"):
        chat.prompt_ids(CONVERSATION)


def test_template_hash_tells_templates_apart() -> None:
    own = Chat(gpt2_like())
    other = Chat(byte_tokenizer("</s>", "<p>", eos_token="</s>", chat_template=PHI))
    assert own.template_hash == Chat(gpt2_like()).template_hash != other.template_hash


# Prompts that fit --------------------------------------------------------------------------------


def fitting(chat: Chat, max_tokens: int) -> str | None:
    ids = chat.fit_prompt(CONVERSATION, max_tokens)
    return None if ids is None else text_of(chat, ids)


def test_fit_prompt_cuts_at_turn_boundaries_and_keeps_the_system_message() -> None:
    chat = Chat(byte_tokenizer("<e>", "<p>", eos_token="<e>", pad_token="<p>"))
    whole = chat.prompt_ids(CONVERSATION)
    short = chat.prompt_ids([CONVERSATION[0], CONVERSATION[3]])
    assert len(short) < len(whole)
    assert chat.fit_prompt(CONVERSATION, len(whole)) == whole
    assert chat.fit_prompt(CONVERSATION, len(whole) - 1) == short
    assert chat.fit_prompt(CONVERSATION, len(short)) == short
    assert chat.fit_prompt(CONVERSATION, len(short) - 1) is None
    assert fitting(chat, len(short)) == "Be kind.\n\nUser:\nWho?\n\nAssistant:\n"


def test_fit_prompt_of_a_string() -> None:
    chat = Chat(byte_tokenizer("<e>", "<p>", eos_token="<e>", pad_token="<p>"))
    whole = chat.prompt_ids("Who?")
    assert chat.fit_prompt("Who?", len(whole)) == whole
    assert chat.fit_prompt("Who?", len(whole) - 1) is None


def test_fit_prompt_keeps_as_many_turns_as_fit() -> None:
    chat = Chat(byte_tokenizer("<e>", "<p>", eos_token="<e>", pad_token="<p>"))
    turns = [
        {"role": role, "content": f"turn {number}"}
        for number in range(4)
        for role in ("user", "assistant")
    ][:-1]
    for kept in (7, 5, 3, 1):
        ids = chat.prompt_ids(turns[-kept:])
        assert chat.fit_prompt(turns, len(ids)) == ids
        assert chat.fit_prompt(turns, len(ids) + 1) == ids
