"""Turns the prompt of a record into token ids that fit a limit; errors name file and row.

The oldest turns are left out until a prompt fits (Chat.fit_prompt). A prompt that still does not
fit is dropped; the stage counts and reports it.
"""

from dataclasses import dataclass

from rlhf.inputs.chat import Chat
from rlhf.inputs.records import Demonstration, Prompt, Ranking, naming_row


@dataclass(frozen=True)
class FittedPrompt:
    """Token ids of a prompt within a limit."""

    ids: tuple[int, ...]
    is_cut: bool
    """Whether its oldest turns were left out."""


def fit_prompt(
    record: Demonstration | Ranking | Prompt, chat: Chat, max_tokens: int
) -> FittedPrompt | None:
    """Fit the prompt of a record; return None if its last turn alone is too long.

    Raises:
        ValueError: The chat template refuses the prompt; the message names file and row.
    """
    with naming_row(record):
        whole = chat.prompt_ids(record.prompt)
        ids = chat.fit_prompt(record.prompt, max_tokens)
    return None if ids is None else FittedPrompt(tuple(ids), is_cut=ids != whole)
