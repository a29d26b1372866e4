"""Checks what a model can read: the token ids that it embeds, and the positions that it has."""

from collections.abc import Mapping

from transformers import PreTrainedModel

from rlhf.inputs.chat import Chat
from rlhf.models.architectures import num_embeddings


def check_vocabulary(model: PreTrainedModel, chat: Chat, path: str) -> None:
    """Refuse a tokenizer that can produce ids for which the model has no embedding."""
    rows = num_embeddings(model)
    numbers = chat.tokenizer.get_vocab()
    beyond = sorted((number, token) for token, number in numbers.items() if number >= rows)
    if not beyond:
        return
    number, token = beyond[0]
    if len(chat.tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(chat.tokenizer)} tokens, the model at {path} embeds {rows}: "
            f"this is the tokenizer of another model, or tokens such as {token!r} (id {number}) "
            "were added to it alone; use the one saved beside the weights"
        )
    raise ValueError(
        f"the tokenizer's token {token!r} has id {number}, but the model at {path} embeds the ids "
        f"0 to {rows - 1} only (so {len(beyond)} tokens have no embedding); use the tokenizer "
        "saved beside the weights, or resize the embeddings (resize_token_embeddings)"
    )


def check_context(model: PreTrainedModel, path: str, limits: Mapping[str, int]) -> None:
    """Refuse limits (setting -> tokens) whose sum is greater than the model's context."""
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and sum(limits.values()) > context:
        names = " + ".join(f"{name} {tokens}" for name, tokens in limits.items())
        raise ValueError(
            f"{names} is more than the {context} tokens that the model at {path} can read; lower it"
        )
