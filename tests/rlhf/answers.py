"""Makes answers for tests, without a policy that samples them."""

from collections.abc import Sequence

from rlhf.generation.answers import Answer
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.records import Prompt, PromptLike


def fitted(chat: Chat, prompt: PromptLike) -> FittedPrompt[Prompt]:
    return FittedPrompt(Prompt(prompt), tuple(chat.prompt_ids(prompt)))


def finished(chat: Chat, prompt: PromptLike, response: str) -> Answer:
    """Make an answer that ends with the end token of the chat."""
    return Answer.of(fitted(chat, prompt), chat.response_ids(response), chat)


def of_ids(
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    *,
    record: Prompt | None = None,
    text: str = "unread",
    is_finished: bool = False,
) -> Answer:
    """Make an answer whose ids and text have nothing to do with each other."""
    return Answer(
        record=record or Prompt("unread"),
        prompt_ids=tuple(prompt_ids),
        response_ids=tuple(response_ids),
        text=text,
        is_finished=is_finished,
    )


def of_text(record: Prompt, text: str) -> Answer:
    """Make an answer for a judge that reads no ids."""
    return of_ids([1], [2], record=record, text=text)
