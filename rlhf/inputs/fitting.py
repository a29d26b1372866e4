"""Turns the prompt of a record into token ids that fit a limit; errors name file and row.

The oldest turns are left out until a prompt fits (Chat.fit_prompt). A prompt that still does not
fit is dropped. Every stage fits prompts by this rule, says how many it cut and dropped, and refuses
to go on if that is more than max_dropped.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rlhf.inputs.chat import Chat
from rlhf.inputs.records import Demonstration, Prompt, Ranking, name_rows, naming_row

Record = TypeVar("Record", Demonstration, Ranking, Prompt)


@dataclass(frozen=True)
class FittedPrompt(Generic[Record]):
    """Holds the token ids of a record's prompt within a limit."""

    record: Record
    ids: tuple[int, ...]
    is_cut: bool = False
    """Whether its oldest turns were left out."""


@dataclass(frozen=True)
class FittedPrompts(Generic[Record]):
    """Holds the prompts of a file that fit, and the records of those that do not."""

    kept: list[FittedPrompt[Record]] = field(default_factory=list)
    dropped: list[Record] = field(default_factory=list)

    @property
    def num_cut(self) -> int:
        """Number of kept prompts that lost their oldest turns."""
        return sum(prompt.is_cut for prompt in self.kept)

    @property
    def num_read(self) -> int:
        """Number of records."""
        return len(self.kept) + len(self.dropped)

    def check_dropped(self, limit: str, max_dropped: float, name: str = "max_dropped") -> None:
        """Check that enough prompts fit.

        Args:
            limit: Name and value of the limit, such as "max_prompt_tokens 512".
            max_dropped: The largest share of the prompts that may be dropped.
            name: The setting that gives max_dropped.

        Raises:
            ValueError: No prompt fits, or a larger share than max_dropped does not.
        """
        if self.kept and len(self.dropped) <= max_dropped * self.num_read:
            return
        raise ValueError(
            f"{len(self.dropped)} of {self.num_read} prompts are over {limit}"
            f"{name_rows(self.dropped)}; raise it, or {name} {max_dropped} to go on without them"
        )

    def describe(self, limit: str) -> str | None:
        """Say how many prompts were cut and dropped, and which; None if all fit as they are.

        Args:
            limit: Name and value of the setting, such as "max_prompt_tokens 512".
        """
        if not self.num_cut and not self.dropped:
            return None
        return (
            f"of {self.num_read} prompts, {self.num_cut} lost early turns and {len(self.dropped)} "
            f"were dropped{name_rows(self.dropped)} to fit {limit}"
        )


def fit_prompt(record: Record, chat: Chat, max_tokens: int) -> FittedPrompt[Record] | None:
    """Fit the prompt of a record; return None if its last turn alone is too long.

    Raises:
        ValueError: The chat template refuses the prompt; the message names file and row.
    """
    with naming_row(record):
        whole = chat.prompt_ids(record.prompt)
        ids = chat.fit_prompt(record.prompt, max_tokens)
    return None if ids is None else FittedPrompt(record, tuple(ids), is_cut=ids != whole)


def fit_prompts(records: Sequence[Record], chat: Chat, max_tokens: int) -> FittedPrompts[Record]:
    """Fit the prompts of all records; the order is kept.

    Raises:
        ValueError: As `fit_prompt`.
    """
    fitted: FittedPrompts[Record] = FittedPrompts()
    for record in records:
        prompt = fit_prompt(record, chat, max_tokens)
        if prompt is None:
            fitted.dropped.append(record)
        else:
            fitted.kept.append(prompt)
    return fitted
