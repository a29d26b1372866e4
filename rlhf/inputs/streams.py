"""Gives every use of random numbers a stream of its own, by its name.

Seeds such as `seed + 1` make streams equal that should differ: the order of the text under one seed
is then the order of the prompts under the next. Here the name is hashed together with the seed, so
two streams are equal only if both their names and their seeds are.
"""

import hashlib
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def python_stream(seed: int, name: str) -> random.Random:
    """Return a new generator of Python's `random` for this seed and name.

    Args:
        name: The stage and the use, such as "collect/labelers". Two uses never share a name.
    """
    return random.Random(f"{seed}/{name}")


def torch_stream(seed: int, name: str, process: int = 0) -> "torch.Generator":
    """Return a new torch generator on the CPU for this seed and name.

    Args:
        name: The stage and the use, such as "ppo/rollouts". Two uses never share a name.
        process: Number of the process, if each draws for rows of its own.
    """
    import torch  # This takes seconds, and programs without models need none.

    digest = hashlib.sha256(f"{seed}/{name}/{process}".encode()).digest()
    # torch takes 64 bits; the shift keeps the sign bit 0.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
