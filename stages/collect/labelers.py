"""Make labelers, choose who ranks what, and check that their answers are rankings."""

import random
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from rlhf.inputs.records import PromptLike, Ranking, RecordError, name_rows
from rlhf.inputs.streams import python_stream
from rlhf.rewards.functions import load_function
from stages.collect.config import Config
from stages.collect.sample import Question

PARTIAL_RANKINGS_FILE = "rankings_so_far.jsonl"
"""File with the rankings so far when a labeler failed, in the order of the prompts. The same
command continues from them."""


@runtime_checkable
class Labeler(Protocol):
    """Ranks responses; `data.tinyworld.labelers.TinyLabeler` is an example."""

    @property
    def name(self) -> str: ...

    def rank(
        self, prompt: PromptLike, responses: Sequence[str], generator: random.Random
    ) -> Sequence[int | None]:
        """Return one rank a response: 1 is best, equal ranks are ties, None is unranked."""
        ...


def load_labelers(config: Config) -> list[Labeler]:
    """Make the labelers that config.labelers names.

    Raises:
        ValueError: there is no such function, or it made no list of labelers, or too few.
    """
    labelers = load_function(config.labelers)(config.labelers_path)
    if not isinstance(labelers, list) or not all(isinstance(one, Labeler) for one in labelers):
        raise ValueError(
            f"{config.labelers} made {labelers!r:.100}; it must return a list of labelers, each "
            "with a name and a method rank(prompt, responses, generator)"
        )
    if not labelers:
        raise ValueError(f"{config.labelers} made no labeler from {config.labelers_path}")
    if config.overlap > 0 and len(labelers) < 2:
        raise ValueError(
            f"overlap is {config.overlap}, but {config.labelers} made one labeler; set overlap 0, "
            "or give a second labeler"
        )
    return labelers


def rank_each(
    questions: Sequence[Question],
    responses: Sequence[Sequence[str]],
    labelers: Sequence[Labeler],
    config: Config,
    before: Sequence[Ranking] = (),
) -> Iterator[list[Ranking]]:
    """Yield, for each prompt in turn, the ranking of a labeler drawn at random.

    A share config.overlap of the prompts also gets the ranking of a second labeler.

    Args:
        before: the first rankings, from an earlier run that stopped. Labelers are not asked for
            them again. They do not change the rankings that follow.

    Raises:
        ValueError: a labeler failed, or `before` ranks other responses or is by other labelers.
    """
    num_twice = round(config.overlap * len(questions))
    draw = python_stream(config.seed, "collect/labelers")
    twice = set(draw.sample(range(len(questions)), num_twice))
    generators = [
        python_stream(config.seed, f"collect/labelers/{i}") for i in range(len(questions))
    ]
    chosen = [one.sample(labelers, 2 if i in twice else 1) for i, one in enumerate(generators)]
    tasks = list(zip(questions, responses, chosen, generators, strict=True))
    wanted = [
        (to.prompt.record.prompt, tuple(texts), one.name)
        for to, texts, by, _ in tasks
        for one in by
    ]
    if [(one.prompt, one.responses, one.labeler) for one in before] != wanted[: len(before)]:
        raise ValueError(
            f"{PARTIAL_RANKINGS_FILE} of {config.output_dir} holds rankings of other responses "
            "or by other labelers than these settings give; give the settings it was made with, or "
            "another output_dir"
        )
    for question, texts, by, generator in tasks:
        known, before = before[: len(by)], before[len(by) :]
        if len(known) == len(by):
            yield list(known)
        else:
            yield [ask_labeler(one, question, texts, generator, config.model.path) for one in by]


def ask_labeler(
    labeler: Labeler,
    question: Question,
    responses: Sequence[str],
    generator: random.Random,
    source: str,
) -> Ranking:
    """Ask one labeler for a ranking.

    Raises:
        ValueError: the labeler failed, or its answer is no list of ranks for these responses.
    """
    record = question.prompt.record
    prompt, place = record.prompt, name_rows([record])
    try:
        ranks = labeler.rank(prompt, list(responses), generator)
    except Exception as error:  # the user's code may raise anything
        raise ValueError(
            f"labeler {labeler.name!r} failed at {prompt!r:.100}{place}: "
            f"{type(error).__name__}: {error}"
        ) from error
    try:
        return Ranking(
            prompt=prompt,
            responses=tuple(responses),
            ranks=tuple(ranks),
            source=source,
            labeler=labeler.name,
        )
    except (RecordError, TypeError) as error:
        raise ValueError(
            f"labeler {labeler.name!r} answered {ranks!r:.100} for {len(responses)} responses to "
            f"{prompt!r:.100}{place}: {error}"
        ) from error
