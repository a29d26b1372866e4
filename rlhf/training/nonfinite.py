"""Telling where the first NaN or infinite value stands."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from accelerate.utils import gather_object
from torch import Tensor

from rlhf.inputs.packing import PromptTree


class NonFiniteError(ValueError):
    """A value is NaN or infinite: in which tensor and phase, and for which prompt if known.

    `step` is the optimizer step, counted over the run from 0; None where none was being taken.
    """

    def __init__(
        self,
        tensor: str,
        phase: str,
        tree: PromptTree | None = None,
        step: int | None = None,
    ) -> None:
        place = phase if step is None else f"{phase} of step {step}"
        super().__init__(f"{tensor} is not finite in phase {place}")
        self.tensor = tensor
        self.phase = phase
        self.tree = tree
        self.step = step


def first_nonfinite(
    tensors: Mapping[str, Tensor],
    trees: Sequence[PromptTree],
    phase: str,
    step: int | None = None,
) -> NonFiniteError | None:
    """Of tensors (batch,) or (batch, time) in the order of the trees, the first that is not finite,
    with its first tree; None: all are finite."""
    for name, tensor in tensors.items():
        bad = (~tensor.isfinite()).reshape(len(trees), -1).any(1)
        if bad.any():
            return NonFiniteError(name, phase, trees[int(bad.nonzero()[0, 0])], step)
    return None


def found_by_any(own: NonFiniteError | None) -> NonFiniteError | None:
    """What the first of the processes that found something did find; all of them take part."""
    fields = None if own is None else (own.tensor, own.phase, own.tree, own.step)
    found = next((one for one in gather_object([fields]) if one is not None), None)
    return None if found is None else NonFiniteError(*found)


@contextmanager
def told_by_all() -> Iterator[None]:
    """A value that one process alone finds not finite inside stops all of them behind it, where the
    others would wait for that one for ever. Inside, processes must not need each other.

    Raises:
        NonFiniteError: one of them found something.
    """
    own = None
    try:
        yield
    except NonFiniteError as error:
        own = error
    found = found_by_any(own)
    if found is not None:
        raise found
