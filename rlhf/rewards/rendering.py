"""Checks whether two models read the same ids for the same text."""

import hashlib
import json

from rlhf.inputs.chat import Chat

_RENDERING_PROBE = "A probe: 12,345 times \u00e9\u4e2d\U0001f600\n\n\tend."


def rendering_hash(chat: Chat) -> str:
    """Hash what turns text into ids: template, vocabulary, end token, and ids of a sample text."""
    parts = [
        chat.template_hash,
        sorted(chat.tokenizer.get_vocab().items()),
        chat.end_id,
        chat.prompt_ids(_RENDERING_PROBE),
        chat.response_ids(_RENDERING_PROBE),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def same_vocabulary(chat_a: Chat, chat_b: Chat) -> bool:
    """Return whether every id means the same to both, so that each can read the other's ids."""
    return chat_a.tokenizer.get_vocab() == chat_b.tokenizer.get_vocab()


def same_rendering(chat_a: Chat, chat_b: Chat) -> bool:
    """Return whether two models' tokenizers and templates give the same ids for every text."""
    return rendering_hash(chat_a) == rendering_hash(chat_b)


def check_rendering(policy_chat: Chat, reward_chat: Chat, path: str) -> None:
    """Raise ValueError if the policy and the reward model at `path` would read different ids."""
    if same_rendering(policy_chat, reward_chat):
        return
    what = (
        "chat template"
        if policy_chat.template_hash != reward_chat.template_hash
        else "tokenizer (the chat templates are equal)"
    )
    raise ValueError(
        f"the reward model at {path} was trained with another {what} than the policy's: rendering "
        f"{rendering_hash(reward_chat)[:12]} against {rendering_hash(policy_chat)[:12]}; train it "
        "from the same SFT model"
    )
