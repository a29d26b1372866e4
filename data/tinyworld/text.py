"""Write the tiny world's plain text (pretraining), and probes of what a model knows of it.

The text states every fact of every person and thing in many sentences, and asks and answers it.
It also holds instructions with their answers. Held-out ones are among them, since pretraining may
show what alignment is later examined on. Instructions name known people and things only.
"""

import random
from collections.abc import Callable, Mapping, Sequence

from data.tinyworld.demonstrations import Quality, join_words, write_response
from data.tinyworld.tasks import (
    EVENTS,
    FACT_QUESTIONS,
    FACT_STATEMENTS,
    REQUESTS,
    SORTED_CATEGORIES,
    SUM_LIMIT,
    draw_instruction,
)
from data.tinyworld.world import (
    CATEGORIES,
    DAYS,
    NUMBERS,
    PERSON_ATTRIBUTES,
    SECRETS,
    THING_ATTRIBUTES,
    World,
    pronoun,
)
from rlhf.inputs.records import Prompt, Text, to_messages

NUM_SHOTS = 2
"""Whole sentences before the last one of a few-shot probe."""

_TOLD: Mapping[str, tuple[str, ...]] = {
    "home": (
        "{name} lives in {value}.",
        "In {value} stands the house of {name}.",
        "The home of {name} is {value}.",
    ),
    "job": (
        "{name} is a {value}.",
        "{name} works as a {value}.",
        "The {value} in the shop is {name}.",
    ),
    "pet": (
        "{name} has a {value}.",
        "The pet of {name} is a {value}.",
        "A {value} sleeps beside {name}.",
    ),
    "material": (
        "The {name} is made of {value}.",
        "They made the {name} of {value}.",
        "Good {value} was used for the {name}.",
    ),
}
_TOLD_ON: Mapping[str, str] = {
    "home": "{pronoun} lives in {value}.",
    "job": "{pronoun} is a {value}.",
    "pet": "{pronoun} has a {value}.",
}
_TALK = (
    "Hello, I am glad to see you.",
    "Good morning, my friend.",
    "I need help with this door today.",
    "A question is not an order.",
    "By the way, the wind is cold when the road is long.",
    "My old aunt was young once and so was the king.",
    "I often think of it when the rain falls on the hill.",
    "She said so many times that it is still cold.",
    "You should know that.",
    "What a silly thing to say.",
    "Leave me alone.",
    "Gladly!",
    "Of course!",
    "Thank you for asking.",
    "Sorry, I cannot tell you that.",
    "Tell me now! You must, it is my right.",
    "Could you please show me the list?",
    "Turn around and go to the next village. Go on.",
    "Finish the work. Make the room clean.",
    "Say it politely or do not say it backwards.",
    "It is polite to wait for an answer.",
    "How much is it? Add two more and give it to the old man.",
    "Name the day and bring the book.",
    "And where does he go? Is she here?",
    "I want to open the door. What comes next?",
    "Lend me a coat and go home.",
)
"""Small talk, so that a model knows the words of instructions and responses."""


def draw_texts(world: World, num_texts: int, generator: random.Random) -> list[Text]:
    """Draw documents, all different; raise a ValueError if the tiny world has too few."""
    writers = list(_WRITERS)
    weights = list(_WRITERS.values())
    texts: dict[str, Text] = {}
    for _ in range(20 * num_texts):
        if len(texts) == num_texts:
            return list(texts.values())
        text = " ".join(generator.choices(writers, weights=weights)[0](world, generator))
        texts[text] = Text(text)
    raise ValueError(f"num_texts is {num_texts}; the tiny world has fewer different documents")


def make_probes(world: World, generator: random.Random) -> list[Prompt]:
    """Make three texts that a value must follow, for every fact of the probe's people and things.

    The text ends right before the value. So the manners and the ways to answer that a policy
    learned change nothing. `meta` holds `text` (give this to the model without a chat template),
    `answer` (the continuation must start with it), `form` (sentence, question, few_shot),
    `subject` and `attribute`. The examples of a few-shot text are facts of the probe too.
    """
    facts = probe_facts(world)
    probes = []
    for subject, attribute in facts:
        statement = FACT_STATEMENTS[attribute].format(name=subject)
        others = generator.sample([fact for fact in facts if fact[0] != subject], k=NUM_SHOTS)
        shots = [_tell(world, *other, generator) for other in others]
        forms = {
            "sentence": statement,
            "question": f"{_ask(subject, attribute, generator)} {statement}",
            "few_shot": " ".join([*shots, statement]),
        }
        for form, text in forms.items():
            meta = {"text": text, "answer": world.fact(subject, attribute), "form": form}
            probes.append(Prompt(text, {**meta, "subject": subject, "attribute": attribute}))
    return probes


def probe_facts(world: World) -> list[tuple[str, str]]:
    """Return (subject, attribute) of every fact that only the plain text states."""
    people = [(name, key) for name in world.probe_people for key in PERSON_ATTRIBUTES]
    things = [(name, key) for name in world.probe_things for key in THING_ATTRIBUTES]
    return people + things


def _ask(subject: str, attribute: str, generator: random.Random) -> str:
    question = generator.choice(FACT_QUESTIONS[attribute]).format(name=subject)
    return f"Question: {question} Answer:"


def _tell(world: World, subject: str, attribute: str, generator: random.Random) -> str:
    template = generator.choice(_TOLD[attribute])
    return template.format(name=subject, value=world.fact(subject, attribute))


def _portrait(world: World, generator: random.Random) -> list[str]:
    name = generator.choice(list(world.people))
    first, *rest = generator.sample(PERSON_ATTRIBUTES, k=len(PERSON_ATTRIBUTES))
    sentences = [_tell(world, name, first, generator)]
    for attribute in rest:
        told_on = _TOLD_ON[attribute].format(
            pronoun=pronoun(name).capitalize(), value=world.fact(name, attribute)
        )
        sentences.append(generator.choice((told_on, _tell(world, name, attribute, generator))))
    return sentences


def _gossip(world: World, generator: random.Random) -> list[str]:
    """Write facts of several people and things."""
    facts = [_draw_fact(world, generator) for _ in range(5)]
    return [_tell(world, *fact, generator) for fact in facts]


def _quiz(world: World, generator: random.Random) -> list[str]:
    subject, attribute = _draw_fact(world, generator)
    value = world.fact(subject, attribute)
    statement = FACT_STATEMENTS[attribute].format(name=subject)
    answer = generator.choice((value, f"{statement} {value}"))
    return [f"{_ask(subject, attribute, generator)} {answer}."]


def _echo(world: World, generator: random.Random) -> list[str]:
    """Write lists of words that are repeated, forwards or backwards."""
    words = [word for category in SORTED_CATEGORIES for word in CATEGORIES[category]]
    sentences = []
    for _ in range(2):
        said = generator.sample(words, k=generator.randint(2, 4))
        again = said if generator.random() < 0.5 else said[::-1]
        how = "again" if again is said else "backwards"
        sentences.append(f"Say {how}: {', '.join(said)}. {', '.join(again)}.")
    return sentences


def _exchange(world: World, generator: random.Random) -> list[str]:
    """Write an instruction with its right answer or, now and then, an evasion."""
    instruction = draw_instruction(world, generator)
    quality = Quality(
        manners=generator.choices(("polite", "plain", "rude"), weights=(34, 58, 8))[0],
        is_answered=generator.random() < 0.94,
        is_brief=generator.random() < 0.9,
    )
    words = {"user": "Question: {}", "assistant": "Reply: {}"}
    turns = to_messages(instruction.prompt)
    asked = [words[turn["role"]].format(turn["content"]) for turn in turns]
    return [*asked, "Answer:", write_response(instruction.task, quality, generator)]


def _draw_fact(world: World, generator: random.Random) -> tuple[str, str]:
    if generator.random() < 0.15:
        return generator.choice(list(world.things)), "material"
    return generator.choice(list(world.people)), generator.choice(PERSON_ATTRIBUTES)


def _sums(world: World, generator: random.Random) -> list[str]:
    sentences = []
    for _ in range(6):
        first, second = generator.randint(0, SUM_LIMIT), generator.randint(0, SUM_LIMIT)
        total = NUMBERS[first + second]
        sentences.append(f"{NUMBERS[first]} plus {NUMBERS[second]} is {total}.")
    return sentences


def _series(world: World, generator: random.Random) -> list[str]:
    start = generator.randint(0, len(NUMBERS) - 6)
    day = generator.randrange(len(DAYS))
    days = [DAYS[(day + i) % len(DAYS)] for i in range(6)]
    return [f"They count: {', '.join(NUMBERS[start : start + 9])}.", f"{', '.join(days)}."]


def _sorts(world: World, generator: random.Random) -> list[str]:
    sentences = []
    for _ in range(3):
        category = generator.choice(list(CATEGORIES))
        count = generator.choice((2, 3))
        members = generator.sample(CATEGORIES[category], k=count)
        sentences.append(f"{NUMBERS[count].capitalize()} {category}s are {join_words(members)}.")
        category = generator.choice(("animal", "plant", "tool"))
        sentences.append(f"The {generator.choice(CATEGORIES[category])} is of the kind {category}.")
    return sentences


def _backwards(world: World, generator: random.Random) -> list[str]:
    words = [word for name in ("animal", "plant", "tool") for word in CATEGORIES[name]]
    sentences = []
    for _ in range(3):
        two = generator.sample(words, k=2)
        sentences.append(f"Forwards: {', '.join(two)}. Backwards: {', '.join(two[::-1])}.")
    return sentences


def _manners(world: World, generator: random.Random) -> list[str]:
    sentences = []
    for _ in range(3):
        name, other = generator.sample(list(world.people), k=2)
        request = f"{generator.choice(REQUESTS)} me the {generator.choice(CATEGORIES['food'])}"
        sentences.append(
            generator.choice(
                (
                    f"{name} said: Please {request}. {other} said: Of course!",
                    f"{name} said: {request.capitalize()}! {other} said: Leave me alone.",
                )
            )
        )
    return sentences


def _moods(world: World, generator: random.Random) -> list[str]:
    sentences = []
    for _ in range(4):
        mood = generator.choice(list(EVENTS))
        name = generator.choice(list(world.people))
        sentences.append(f"{name} {generator.choice(EVENTS[mood])}. That is {mood}.")
    return sentences


def _talk(world: World, generator: random.Random) -> list[str]:
    speakers = generator.sample(list(world.people), k=3)
    return [f"{name} said: {generator.choice(_TALK)}" for name in speakers]


def _secrets(world: World, generator: random.Random) -> list[str]:
    places = generator.sample(list(SECRETS), k=4)
    return [f"The secret word of the {place} is {SECRETS[place]}." for place in places]


_WRITERS: Mapping[Callable[[World, random.Random], Sequence[str]], int] = {
    _portrait: 18,
    _gossip: 3,
    _quiz: 20,
    _exchange: 100,
    _echo: 18,
    _sums: 1,
    _series: 1,
    _sorts: 3,
    _backwards: 1,
    _manners: 1,
    _moods: 3,
    _talk: 3,
    _secrets: 1,
}
"""Maps each writer of documents to its relative frequency."""
