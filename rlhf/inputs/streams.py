"""Gives every use of random numbers a stream of its own, by its name.

Seeds such as `seed + 1` make streams equal that should not be: the order of the text under one seed
is then the order of the prompts under the next. Here the whole name is hashed together with the
seed, so two streams agree only if both their names and their seeds do.
"""

import hashlib
import random

import torch


def python_stream(seed: int, name: str) -> random.Random:
    """Start the stream of this name for Python's own draws.

    Args:
        name: starts with the stage, such as "collect/labelers"; two uses never share one.
    """
    return random.Random(f"{seed}/{name}")


def torch_stream(seed: int, name: str, process: int = 0) -> torch.Generator:
    """Start the stream of this name, on the CPU, for draws of torch.

    Args:
        name: starts with the stage, such as "ppo/rollouts"; two uses never share one.
        process: the process that draws from it, where each draws for rows of its own.
    """
    digest = hashlib.sha256(f"{seed}/{name}/{process}".encode()).digest()
    # torch takes 64 bits; the sign is left alone.
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
