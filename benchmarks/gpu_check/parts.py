"""List the parts of the check, in their order."""

from dataclasses import dataclass
from typing import Literal

TOTAL_SECONDS = 540
"""Nine minutes for all parts together."""


@dataclass(frozen=True)
class Part:
    """Describes a part of the check."""

    name: str
    question: str
    """What its table answers."""
    seconds: int
    """Its time limit. The limits of all parts add up to TOTAL_SECONDS at most."""
    without_gpu: Literal["run", "run if smoke", "skip"] = "run if smoke"


PARTS = (
    Part("environment", "What is this machine, and which packages does it have?", 50, "run"),
    Part("models", "Which random models are the figures below about?", 60),
    Part("tests", "Do the tests marked gpu pass?", 100, "skip"),
    Part(
        "noise",
        "How far apart, in nats a token, are sampler and packed pass, and the passes of rollout "
        "and training? At which difference does an alarm go off?",
        70,
    ),
    Part("decoding", "How long does a decoded token take, and in which type is the cache?", 50),
    Part("rows", "Which attention is fastest for a packed row?", 80),
    Part(
        "allocator",
        "How much memory does the allocator hold beyond what a rollout uses?",
        20,
        "skip",
    ),
    Part("peak", "Is the plan's peak of a PPO update right?", 30),
    Part("peers", "How fast are we next to TRL?", 80, "skip"),
)
