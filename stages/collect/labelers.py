"""The seam to labelers: how they are made, who ranks what, and that their answers are rankings."""

import random
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from rlhf.records import PromptLike, Ranking, RecordError
from rlhf.rewards import load_function
from stages.collect.config import Config
from stages.collect.sample import Question

SO_FAR_FILE = "rankings_so_far.jsonl"
"""What was ranked when a labeler failed; valid rankings, in the order of the prompts. The same
command goes on from them."""


@runtime_checkable
class Labeler(Protocol):
    """Whoever ranks responses; `data.tinyworld.labelers.TinyLabeler` is one."""

    @property
    def name(self) -> str: ...

    def rank(
        self, prompt: PromptLike, responses: Sequence[str], generator: random.Random
    ) -> Sequence[int | None]:
        """One rank a response: 1 is best, equal ranks are ties, None is unranked."""
        ...


def load_labelers(config: Config) -> list[Labeler]:
    """The labelers that config.labelers makes.

    Raises:
        ValueError: no such function, what it made is no list of labelers, or too few of them.
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
    """Of each prompt in turn a ranking by a labeler drawn at random; of the share config.overlap a
    second labeler's after it.

    Args:
        before: the first rankings, of an earlier run that was cut off. Nobody is asked for them
            again, and the others are what they are without them.

    Raises:
        ValueError: a labeler failed, or those before are of other responses or labelers.
    """
    num_twice = round(config.overlap * len(questions))
    draw = random.Random(f"{config.seed}/labelers")
    twice = set(draw.sample(range(len(questions)), num_twice))
    generators = [random.Random(f"{config.seed}/labelers/{i}") for i in range(len(questions))]
    chosen = [one.sample(labelers, 2 if i in twice else 1) for i, one in enumerate(generators)]
    tasks = list(zip(questions, responses, chosen, generators, strict=True))
    wanted = [(to.prompt, tuple(texts), one.name) for to, texts, by, _ in tasks for one in by]
    if [(one.prompt, one.responses, one.labeler) for one in before] != wanted[: len(before)]:
        raise ValueError(
            f"{SO_FAR_FILE} of {config.output_dir} holds rankings of other responses or by other "
            "labelers than these settings give; give the settings it was made with, or another "
            "output_dir"
        )
    for question, texts, by, generator in tasks:
        known, before = before[: len(by)], before[len(by) :]
        if len(known) == len(by):
            yield list(known)
        else:
            yield [ask(one, question, texts, generator, config.model.path) for one in by]


def ask(
    labeler: Labeler,
    question: Question,
    responses: Sequence[str],
    generator: random.Random,
    source: str,
) -> Ranking:
    """One labeler's ranking.

    Raises:
        ValueError: the labeler failed, or what it answered are no ranks of these responses.
    """
    prompt, place = question.prompt, question.place
    try:
        ranks = labeler.rank(prompt, list(responses), generator)
    except Exception as error:  # code of the user's
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
