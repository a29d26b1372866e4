"""Draw how many responses each prompt gets, and sample them."""

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from rlhf.generation.answers import Answer, sample_answers
from rlhf.generation.engines import engine_of
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt, fit_prompts
from rlhf.inputs.records import Prompt
from rlhf.inputs.streams import python_stream, torch_stream
from rlhf.runs.stopwatch import progress_shown
from rlhf.training.processes import own_share
from stages.collect.config import Config


@dataclass(frozen=True)
class Question:
    """Holds a prompt that fits, and how many answers it gets."""

    prompt: FittedPrompt[Prompt]
    num_samples: int


def make_questions(prompts: Sequence[Prompt], chat: Chat, config: Config) -> list[Question]:
    """Return the prompts that fit, each with its K. Print how many were cut and dropped.

    Raises:
        ValueError: a larger share than max_dropped does not fit.
    """
    limit = f"max_prompt_tokens {config.max_prompt_tokens}"
    fitted = fit_prompts(prompts, chat, config.max_prompt_tokens)
    fitted.check_dropped(limit, config.max_dropped)
    text = fitted.describe(limit)
    if text is not None:
        print(f"collect: {text}")
    draw = python_stream(config.seed, "collect/num_samples").randint
    bounds = config.num_responses_min, config.num_responses_max
    return [Question(prompt, num_samples=draw(*bounds)) for prompt in fitted.kept]


def sample_responses(
    policy: PreTrainedModel,
    questions: Sequence[Question],
    chat: Chat,
    config: Config,
    accelerator: Accelerator,
) -> list[list[Answer]]:
    """Sample the answers to each question; the processes share the work, and each gets all."""
    rank = accelerator.process_index
    numbers = [i for i, question in enumerate(questions) for _ in range(question.num_samples)]
    mine = own_share(accelerator, numbers)
    with (
        engine_of(policy, config.generation) as engine,
        progress_shown("collect: samples", len(mine), is_first_process=rank == 0) as progress,
    ):
        drawn = sample_answers(
            engine,
            [questions[i].prompt for i in mine],
            chat,
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            generator=torch_stream(config.seed, "collect/samples", rank),
            progress=progress,
        )
    answers: list[list[Answer]] = [[] for _ in questions]
    for i, answer in gather_object(list(zip(mine, drawn, strict=True))):
        answers[i].append(answer)
    return answers
