"""Holds all uses of TRL's private names in this stage.

There is no public way to do this. It was tried with TRL 1.16.0; try a new version here first.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from trl.trainer import utils


@contextmanager
def narrow_logits(width: int) -> Iterator[None]:
    """Have the fused head compute at most `width` columns of logits at a time, inside."""
    original = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(original, width)
    try:
        yield
    finally:
        utils._CHUNKED_LOGPROB_CHUNK_SIZE = original
