"""Train a byte-pair tokenizer on the pretraining text, with the chat format built in."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

DOCUMENT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL_TOKENS = (DOCUMENT, PAD)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}Question: {{ message['content'] }} "
    "{% if loop.revindex > 2 %}Reply:{% else %}Answer:{% endif %}"
    "{% elif message['role'] == 'system' %}{{ message['content'] }} "
    "{% else %} {{ message['content'] }}{% if loop.last %}{{ eos_token }}{% else %} {% endif %}"
    "{% endif %}{% endfor %}"
)
"""Renders turns in the words of the pretraining text. So a base model knows what is asked of it,
and ends a response as it ends a document. Responses of earlier turns follow "Reply:", so that an
"Answer:" is always the last of its document, as in the text."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can encode any text; every document starts with <|endoftext|>.

    A space is put before the first word of a text or turn, and removed again in decoding. So a word
    has the same ids wherever it stands. Otherwise a small model would have to learn each fact
    twice, inside a sentence and at the start of a response.

    Raises:
        ValueError: vocab_size leaves no room for the 256 bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size is {vocab_size}; give at least {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{DOCUMENT} $A", special_tokens=[(DOCUMENT, tokenizer.token_to_id(DOCUMENT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT,
        eos_token=DOCUMENT,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
