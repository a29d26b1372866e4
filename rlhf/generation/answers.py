"""Samples answers, each in one record that rewards, figures and files take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from rlhf.generation.interface import Decoding, Engine
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import PromptTree
from rlhf.inputs.records import Prompt


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Holds a response that a policy sampled, and the prompt that it answers."""

    record: Prompt
    """The record of the prompt."""
    prompt_ids: tuple[int, ...]
    """The prompt as the policy read it, possibly without its oldest turns."""
    response_ids: tuple[int, ...]
    """The response as the policy wrote it, with the end token if there is one."""
    text: str
    """The response in words, without the end token."""
    is_finished: bool
    """Whether the response has an end token."""
    logprobs: tuple[float, ...] = ()
    """Log-probability of each token in nats, as the sampler computed it. Empty if not sampled."""

    @classmethod
    def of(
        cls,
        prompt: FittedPrompt[Prompt],
        response_ids: Sequence[int],
        chat: Chat,
        logprobs: Sequence[float] = (),
    ) -> "Answer":
        """Make the record of a response; `chat` is that of the policy that wrote it."""
        return cls(
            record=prompt.record,
            prompt_ids=prompt.ids,
            response_ids=tuple(response_ids),
            text=chat.decode(response_ids),
            is_finished=chat.has_end(response_ids),
            logprobs=tuple(logprobs),
        )

    @property
    def tree(self) -> PromptTree:
        """The prompt with this one response."""
        return PromptTree(self.prompt_ids, (self.response_ids,))

    def ids_ending_with(self, end_id: int) -> tuple[int, ...]:
        """Return the response with this end token in place of its own, if it has one.

        A policy's files may declare several end tokens. A reward model learned from responses that
        end with the one of its chat template.
        """
        return (*self.response_ids[:-1], end_id) if self.is_finished else self.response_ids


def sample_answers(
    engine: Engine,
    prompts: Sequence[FittedPrompt[Prompt]],
    chat: Chat,
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[Answer]:
    """Sample one answer to each prompt, in the order of the prompts.

    Args:
        engine: Holds the policy's weights. Equal weights and equal generators give equal answers.
        chat: The policy's rendering, with all tokens that end its responses.

    For the other arguments see `Decoding` and `Engine.generate`.
    """
    samples = engine.generate(
        [prompt.ids for prompt in prompts],
        Decoding(
            end_id=chat.end_id,
            other_ends=chat.other_ends,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
        ),
        generator,
        progress,
    )
    drawn = zip(prompts, samples.responses, samples.logprobs, strict=True)
    return [Answer.of(prompt, response, chat, logprobs) for prompt, response, logprobs in drawn]
