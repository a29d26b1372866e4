"""Loads a model's tokenizer, with a chat template, a pad token and all declared end tokens."""

from collections.abc import Iterable
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rlhf.inputs.chat import Chat
from rlhf.inputs.template import add_missing_parts
from rlhf.models.adapters import find_adapter
from rlhf.models.full import check_folder, naming_model
from rlhf.models.settings import ModelSettings


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model folder or hub id. Add missing template and pad."""
    tokenizer = _load_as_it_is(path, trust_remote_code=trust_remote_code)
    with naming_model(path):
        return add_missing_parts(tokenizer, _declared_ends(path, tokenizer))


def has_chat_template(settings: ModelSettings) -> bool:
    """Return whether a model's own files have a chat template, which `load_tokenizer` would add."""
    tokenizer = _load_as_it_is(settings.path, trust_remote_code=settings.trust_remote_code)
    return bool(tokenizer.chat_template)


def _load_as_it_is(path: str, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    check_folder(path)
    with naming_model(path):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)


def load_chat(settings: ModelSettings) -> Chat:
    """Load the Chat of a model folder or hub id, with all declared end tokens."""
    tokenizer = load_tokenizer(settings.path, trust_remote_code=settings.trust_remote_code)
    return Chat(tokenizer, _declared_ends(settings.path, tokenizer))


def _declared_ends(path: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens in a model's generation_config.json; none if there is no such file."""
    adapter = find_adapter(path)
    for place in [path] if adapter is None else [path, adapter.base]:
        try:
            return ends_of(GenerationConfig.from_pretrained(place), tokenizer)
        except (OSError, ValueError):  # there is no such file, or it cannot be read
            continue
    return []


def ends_of(generation: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the end tokens that a generation config declares.

    A config made from the model's config holds an architecture's defaults. From these, only an
    added token without another role is taken."""
    ends = generation.eos_token_id
    declared = [ends] if isinstance(ends, int) else list(ends or ())
    known: Iterable[int] = range(len(tokenizer))
    if getattr(generation, "_from_model_config", False):
        others = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}
        known = {*tokenizer.added_tokens_decoder} - others | {tokenizer.eos_token_id}
    return [end for end in declared if end in known]
