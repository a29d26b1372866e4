"""How many responses each prompt gets, and the responses."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf.chat import Chat
from rlhf.distributed import own_share
from rlhf.fitting import fit_prompt
from rlhf.generation import Decoding, generate
from rlhf.records import Prompt, PromptLike, name_rows
from stages.collect.config import Config


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt that fits, its ids, and how many samples it gets."""

    prompt: PromptLike
    ids: list[int]
    num_samples: int
    place: str
    """File and row in words, see `name_rows`."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A response of the policy."""

    text: str
    num_tokens: int
    """The end token included."""
    ended: bool
    """Whether it has an end token."""


def make_questions(prompts: Sequence[Prompt], chat: Chat, config: Config) -> list[Question]:
    """Prompts that fit, each with its K; the ones that do not are left out.

    Raises:
        ValueError: a larger share than max_dropped does not fit.
    """
    generator = random.Random(f"{config.seed}/num_samples")
    questions, dropped = [], []
    for record in prompts:
        num_samples = generator.randint(config.num_responses_min, config.num_responses_max)
        prompt = fit_prompt(record, chat, config.max_prompt_tokens)
        if prompt is None:
            dropped.append(record)
        else:
            question = Question(
                prompt=record.prompt,
                ids=list(prompt.ids),
                num_samples=num_samples,
                place=name_rows([record]),
            )
            questions.append(question)
    if len(dropped) / len(prompts) > config.max_dropped or not questions:
        raise ValueError(
            f"{len(dropped)} of {len(prompts)} prompts are over max_prompt_tokens "
            f"{config.max_prompt_tokens}{name_rows(dropped)}; raise it, or max_dropped "
            f"{config.max_dropped} to go on without them"
        )
    return questions


def sample_responses(
    policy: PreTrainedModel,
    questions: Sequence[Question],
    chat: Chat,
    config: Config,
    accelerator: Accelerator,
) -> list[list[Sample]]:
    """Samples of each question; the processes share the work and all get all of them."""
    rank, num_processes = accelerator.process_index, accelerator.num_processes
    repeated = [(i, one.ids) for i, one in enumerate(questions) for _ in range(one.num_samples)]
    mine = own_share(accelerator, repeated)
    with tqdm(total=len(mine), desc="collect", unit="sample", disable=rank > 0) as bar:
        drawn = generate(
            policy,
            [ids for _, ids in mine],
            config.generation,
            Decoding(
                end_id=chat.end_id,
                other_ends=chat.other_ends,
                max_new_tokens=config.max_new_tokens,
                temperature=config.temperature,
            ),
            generator=torch.Generator().manual_seed(config.seed * num_processes + rank),
            progress=bar.update,
        )
    samples: list[list[Sample]] = [[] for _ in questions]
    numbered = [(i, response) for (i, _), response in zip(mine, drawn.responses, strict=True)]
    for i, response in gather_object(numbered):
        ended = chat.has_end(response)
        text = chat.decode(response)
        samples[i].append(Sample(text=text, num_tokens=len(response), ended=ended))
    return samples
