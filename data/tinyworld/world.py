"""Draw the people, things and secrets of the tiny world from one seed."""

import json
import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from rlhf.inputs.streams import python_stream

WORLD_FILE = "world.json"

WOMEN = "Mira Anna Lena Rosa Tilda Vera".split()
MEN = "Tobin Odo Arno Bruno Hugo Otto".split()
THINGS = "bell bench bowl bridge chair clock".split()
SECRETS = dict(
    zip(
        "cave chest vault cellar".split(),
        "zorin velka quorra jaxom".split(),
        strict=True,
    )
)
"""Maps each place to the secret word that opens it. These words occur nowhere else."""

NUMBERS = "zero one two three four five six seven eight nine ten".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

VALUES: Mapping[str, tuple[str, ...]] = {
    "home": tuple("Oakham Dunfell Redmoor Ashby".split()),
    "job": tuple("baker farmer miller weaver".split()),
    "pet": tuple("cat dog fox goat".split()),
    "material": tuple("oak iron clay stone".split()),
}
"""Maps each attribute of a fact to its possible values."""

PERSON_ATTRIBUTES = ("home", "job", "pet")
THING_ATTRIBUTES = ("material",)

CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "animal": VALUES["pet"],
    "food": tuple("bread cheese soup honey".split()),
    "plant": tuple("rose fern moss tulip".split()),
    "tool": tuple("hammer saw rake needle".split()),
    "colour": tuple("red blue green white".split()),
    "village": VALUES["home"],
    "job": VALUES["job"],
    "material": VALUES["material"],
}
"""Maps each category to its members, which instructions list and classify."""

PROBE_SHARE = 1 / 3
"""Share of the people and of the things that only the plain text names."""


@dataclass(frozen=True)
class World:
    """Holds everything that is true in one tiny world.

    Attributes:
        seed: Seed of the world, and of every other random choice of the data.
        people: Maps name to attribute to value, for all PERSON_ATTRIBUTES.
        things: Maps name to attribute to value, for all THING_ATTRIBUTES.
        probe_people: People that no instruction may name.
        probe_things: Things that no instruction may name.
    """

    seed: int
    people: dict[str, dict[str, str]]
    things: dict[str, dict[str, str]]
    probe_people: tuple[str, ...]
    probe_things: tuple[str, ...]

    @classmethod
    def from_seed(cls, seed: int) -> Self:
        """Draw the world of a seed; the same seed gives the same world on every machine."""
        generator = python_stream(seed, "world")
        people = [*WOMEN, *MEN]
        things = list(THINGS)
        generator.shuffle(people)
        generator.shuffle(things)
        return cls(
            seed=seed,
            people=_draw_facts(people, PERSON_ATTRIBUTES, generator),
            things=_draw_facts(things, THING_ATTRIBUTES, generator),
            probe_people=tuple(people[: round(len(people) * PROBE_SHARE)]),
            probe_things=tuple(things[: round(len(things) * PROBE_SHARE)]),
        )

    @classmethod
    def load(cls, data_dir: str | Path) -> Self:
        """Load the world that a data folder was made from."""
        path = Path(data_dir) / WORLD_FILE
        try:
            recorded = json.loads(path.read_text(encoding="utf-8"))
            world = cls(
                **{
                    **recorded,
                    "probe_people": tuple(recorded["probe_people"]),
                    "probe_things": tuple(recorded["probe_things"]),
                }
            )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} holds no tiny world; run data.tinyworld again") from error
        return world

    @property
    def known_people(self) -> list[str]:
        """People that instructions may name."""
        return [name for name in self.people if name not in self.probe_people]

    @property
    def known_things(self) -> list[str]:
        """Things that instructions may name."""
        return [name for name in self.things if name not in self.probe_things]

    def fact(self, subject: str, attribute: str) -> str:
        """Return the value of a person's or a thing's attribute."""
        return {**self.people, **self.things}[subject][attribute]

    def to_json(self) -> dict[str, Any]:
        """Return the world as plain JSON values, for world.json."""
        plain: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return plain


def pronoun(name: str) -> str:
    """Return the pronoun of a person."""
    return "she" if name in WOMEN else "he"


def _draw_facts(
    names: list[str], attributes: tuple[str, ...], generator: random.Random
) -> dict[str, dict[str, str]]:
    return {
        name: {attribute: generator.choice(VALUES[attribute]) for attribute in attributes}
        for name in names
    }
