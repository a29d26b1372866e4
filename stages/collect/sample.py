"""Draw how many responses each prompt gets, and sample them."""

from collections.abc import Sequence
from dataclasses import dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import fit_prompt
from rlhf.inputs.records import Prompt, PromptLike, name_rows
from rlhf.inputs.streams import python_stream, torch_stream
from rlhf.training.processes import own_share
from stages.collect.config import Config


@dataclass(frozen=True, kw_only=True)
class Question:
    """Holds a prompt that fits, its token ids, and how many samples it gets."""

    prompt: PromptLike
    ids: list[int]
    num_samples: int
    place: str
    """File and row in words, see `name_rows`."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Holds a response of the policy."""

    text: str
    num_tokens: int
    """Number of tokens, the end token included."""
    ended: bool
    """Whether the response has an end token."""


def make_questions(prompts: Sequence[Prompt], chat: Chat, config: Config) -> list[Question]:
    """Return the prompts that fit, each with its K.

    Raises:
        ValueError: a larger share than max_dropped does not fit.
    """
    generator = python_stream(config.seed, "collect/num_samples")
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
    """Sample the responses to each question; the processes share the work, and each gets all."""
    rank = accelerator.process_index
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
            generator=torch_stream(config.seed, "collect/samples", rank),
            progress=bar.update,
        )
    samples: list[list[Sample]] = [[] for _ in questions]
    numbered = [(i, response) for (i, _), response in zip(mine, drawn.responses, strict=True)]
    for i, response in gather_object(numbered):
        ended = chat.has_end(response)
        text = chat.decode(response)
        samples[i].append(Sample(text=text, num_tokens=len(response), ended=ended))
    return samples
