"""Write responses of mixed quality, as labelers of mixed diligence would.

Each response is polite, plain or rude; an answer or an evasion; right or wrong; brief or rambling;
whole or cut short. The five are drawn independently. A policy that imitates these responses knows
what to do but often does it badly, so that preferences can still teach it something.
"""

import random
from dataclasses import dataclass
from typing import Literal, Self

from data.tinyworld.tasks import Task
from data.tinyworld.world import CATEGORIES, NUMBERS

OPENERS = {
    "polite": ("Of course!", "Gladly!", "Thank you for asking."),
    "plain": ("",),
    "rude": ("What a silly question.", "You should know that.", "Leave me alone."),
}
EVASION = "I do not know."
"""The answer of a labeler who did not look for the right one. There is only one, so that it is
often the most likely response of a policy that imitates it, and preferences can teach it to
answer."""
RAMBLES = (
    "By the way, the wind is cold today.",
    "I often think of it when the rain falls.",
    "My old aunt said so many times.",
)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Says how well a response is written."""

    manners: Literal["polite", "plain", "rude"] = "polite"
    is_answered: bool = True
    is_right: bool = True
    is_brief: bool = True
    is_whole: bool = True

    @classmethod
    def draw(cls, generator: random.Random) -> Self:
        """Draw from the mixture of the demonstrations: one in seven is good in every respect."""
        return cls(
            manners=generator.choices(("polite", "plain", "rude"), weights=(35, 35, 30))[0],
            is_answered=generator.random() < 0.77,
            is_right=generator.random() < 0.96,
            is_brief=generator.random() < 0.62,
            is_whole=generator.random() < 0.9,
        )


def write_response(task: Task, quality: Quality, generator: random.Random) -> str:
    """Write a response of a given quality to a task."""
    if not quality.is_answered:
        core = EVASION
    elif quality.is_right:
        core = generator.choice(task.statements).format(answer=_right_answer(task, generator))
    else:
        core = generator.choice(task.wrong_statements).format(answer=_wrong_answer(task, generator))
    ramble = "" if quality.is_brief else generator.choice(RAMBLES)
    opener = generator.choice(OPENERS[quality.manners])
    response = " ".join(part for part in (opener, core, ramble) if part)
    return response if quality.is_whole else _cut(response, generator)


def _cut(response: str, generator: random.Random) -> str:
    """Cut the last one to three words, or at least the last punctuation mark, off a response."""
    words = response.split()
    kept = words[: -generator.randint(1, 3)] or words[:1]
    return " ".join(kept).rstrip(".,!?")


def _right_answer(task: Task, generator: random.Random) -> str:
    if task.kind == "list":
        return join_words(generator.sample(task.answers, k=task.count))
    return ", ".join(task.answers)


def _wrong_answer(task: Task, generator: random.Random) -> str:
    if task.wrong:
        return generator.choice(task.wrong)
    if task.kind == "list":
        return _wrong_list(task, generator)
    if task.kind == "sum":
        return generator.choice([number for number in NUMBERS if number != task.answers[0]])
    shuffled = list(task.answers)
    while tuple(shuffled) == task.answers:
        generator.shuffle(shuffled)
    return ", ".join(shuffled)


def _wrong_list(task: Task, generator: random.Random) -> str:
    """Make a list with one member too few, or with one member of another category."""
    members = generator.sample(task.answers, k=task.count)
    if generator.random() < 0.5:
        return join_words(members[:-1])
    others = [word for words in CATEGORIES.values() for word in words if word not in task.answers]
    return join_words([*members[:-1], generator.choice(others)])


def join_words(words: list[str]) -> str:
    """Join words as in `a, b and c`."""
    return " and ".join(part for part in (", ".join(words[:-1]), words[-1]) if part)
