"""A prompt that fits: every stage's door from records to token ids, with file and row in messages.

The oldest turns of a prompt are left out until it fits (Chat.fit_prompt); what does not fit even
then is left out, counted and told by the stage.
"""

from dataclasses import dataclass

from rlhf.inputs.chat import Chat
from rlhf.inputs.records import Demonstration, Prompt, Ranking, naming_row


@dataclass(frozen=True)
class FittedPrompt:
    """Token ids of a prompt within a limit."""

    ids: tuple[int, ...]
    is_cut: bool
    """It lost its oldest turns."""


def fit_prompt(
    record: Demonstration | Ranking | Prompt, chat: Chat, max_tokens: int
) -> FittedPrompt | None:
    """The prompt of a record; None where its last turn alone is too long.

    Raises:
        ValueError: the chat template refuses it; the message names file and row.
    """
    with naming_row(record):
        whole = chat.prompt_ids(record.prompt)
        ids = chat.fit_prompt(record.prompt, max_tokens)
    return None if ids is None else FittedPrompt(tuple(ids), is_cut=ids != whole)
