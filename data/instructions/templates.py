"""Draw instructions for public prompts, and put them into words.

A model cannot learn from a reward that it never gets. So only instructions are drawn that one of
135 million parameters follows now and then. Some kinds of checks.py are never drawn: only
capital letters, quotation marks around the whole answer, a given last sentence, and an exact number
of bullets. Of SmolLM2-135M's samples, 1 in 33 followed one of these. The checks know them for
IFEval's prompts and for larger models.
"""

import random
from collections.abc import Callable

from data.instructions.checks import Instruction

COMMON_WORDS = ("time", "people", "good", "new", "work", "day", "way", "water", "first", "help")
FREQUENT_WORDS = ("the", "and", "you", "is", "it", "can")

Draw = Callable[[random.Random], Instruction]

DRAWS: tuple[tuple[str, Draw], ...] = (
    ("case", lambda _: {"kind": "lowercase"}),
    ("length", lambda rng: {"kind": "words_at_most", "count": rng.choice((10, 15, 20, 25))}),
    ("length", lambda rng: {"kind": "words_at_least", "count": rng.choice((15, 20, 25))}),
    ("length", lambda rng: {"kind": "sentences_at_most", "count": rng.choice((1, 2))}),
    ("length", lambda rng: {"kind": "sentences_at_least", "count": rng.choice((2, 3))}),
    ("words", lambda rng: {"kind": "contains", "words": [rng.choice(COMMON_WORDS)]}),
    ("words", lambda rng: {"kind": "avoids", "words": [rng.choice(FREQUENT_WORDS)]}),
    ("characters", lambda _: {"kind": "no_comma"}),
    (
        "characters",
        lambda rng: {"kind": "characters_at_least", "character": "!", "count": rng.choice((1, 2))},
    ),
)
"""Pairs of a topic and a function that draws an instruction on it. A prompt gets at most one
instruction on each topic, since two on the same topic could contradict each other."""

NUM_GROUPS = len({group for group, _ in DRAWS})

_SENTENCES = {
    "lowercase": "Write all of your answer in lowercase letters.",
    "words_at_most": "Use at most {count} words.",
    "words_at_least": "Use at least {count} words.",
    "sentences_at_most": "Your answer must have at most {count} sentence{s}.",
    "sentences_at_least": "Your answer must have at least {count} sentences.",
    "contains": 'Your answer must contain the word "{words[0]}".',
    "avoids": 'Do not use the word "{words[0]}".',
    "no_comma": "Do not use any commas.",
    "characters_at_least": 'Use the character "{character}" at least {count} time{s}.',
}


def draw_instructions(rng: random.Random, count: int) -> list[Instruction]:
    """Draw `count` instructions, each on a different topic."""
    drawn: dict[str, Instruction] = {}
    for group, draw in rng.sample(DRAWS, k=len(DRAWS)):
        if group not in drawn and len(drawn) < count:
            drawn[group] = draw(rng)
    return list(drawn.values())


def in_words(prompt: str, instructions: list[Instruction]) -> str:
    """Return the prompt with the instructions after it, on a line of their own."""
    sentences = [
        _SENTENCES[one["kind"]].format(**one, s="" if one.get("count") == 1 else "s")
        for one in instructions
    ]
    return f"{prompt.strip()}\n{' '.join(sentences)}"
