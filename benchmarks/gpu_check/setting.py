"""Set how much work the parts do, on a GPU and in a smoke test."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Sizes:
    """Holds the sizes of the work."""

    shape: str
    """Shape of the random Llama (benchmarks.folders)."""
    episodes: int
    """Prompts of a rollout, of which a quarter makes a mini-batch."""
    prompt_tokens: tuple[int, int]
    """Shortest and longest prompt."""
    new_tokens: int
    """Tokens of each response of a rollout."""
    micro_batch_tokens: int
    token_counts: tuple[int, ...]
    """Numbers of tokens whose largest difference is reported. Episodes times new_tokens is at
    least the last one."""
    decoded_batches: tuple[int, ...]
    decoded_tokens: int
    row_tokens: tuple[int, ...]
    """Lengths of the packed rows; the trees in them have tree_tokens."""
    tree_tokens: int
    timed_seconds: float
    """A pass is repeated for this long, and the fastest counts."""


ON_GPU = Sizes(
    shape="350M",
    episodes=80,
    prompt_tokens=(16, 256),
    new_tokens=128,
    micro_batch_tokens=4096,
    token_counts=(100, 1_000, 10_000),
    decoded_batches=(64, 512),
    decoded_tokens=32,
    row_tokens=(4096, 16384),
    tree_tokens=512,
    timed_seconds=0.5,
)
SMOKE = Sizes(
    shape="1M",
    episodes=8,
    prompt_tokens=(4, 8),
    new_tokens=8,
    micro_batch_tokens=48,
    token_counts=(10, 50),
    decoded_batches=(2, 4),
    decoded_tokens=2,
    row_tokens=(32, 64),
    tree_tokens=16,
    timed_seconds=0.0,
)


@dataclass(frozen=True)
class Setting:
    """Holds what the user asked for."""

    folder: Path
    """Where the models are made."""
    is_smoke: bool = False
    model: str | None = None
    """Folder of a trained policy. None makes a random one."""

    @property
    def sizes(self) -> Sizes:
        return SMOKE if self.is_smoke else ON_GPU
