"""Finds where the first NaN or infinite value is."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from accelerate.utils import gather_object
from torch import Tensor

from rlhf.inputs.packing import PromptTree
from rlhf.training.settings import OptimSettings


class NonFiniteError(ValueError):
    """Says that a value is NaN or infinite: in which tensor and phase, and for which prompt.

    The prompt is None if it is not known. `step` is the optimizer step, counted over the run from
    0; None if no step was being taken.
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
    """Return an error for the first tensor that is not finite, with its first bad tree.

    Tensors are (batch,) or (batch, time), in the order of the trees. None means that all are
    finite."""
    for name, tensor in tensors.items():
        bad = (~tensor.isfinite()).reshape(len(trees), -1).any(1)
        if bad.any():
            return NonFiniteError(name, phase, trees[int(bad.nonzero()[0, 0])], step)
    return None


def found_by_any(own: NonFiniteError | None) -> NonFiniteError | None:
    """Return the error of the first process that has one. All processes must call this."""
    fields = None if own is None else (own.tensor, own.phase, own.tree, own.step)
    found = next((one for one in gather_object([fields]) if one is not None), None)
    return None if found is None else NonFiniteError(*found)


@contextmanager
def with_remedy(settings: OptimSettings) -> Iterator[None]:
    """Add the settings to change to an error about a value that is not finite.

    Raises:
        ValueError: Replaces the NonFiniteError.
    """
    try:
        yield
    except NonFiniteError as error:
        raise ValueError(
            f"{error}; lower optim.learning_rate ({settings.learning_rate:g}), or train in float32"
        ) from error


@contextmanager
def raised_in_all_processes() -> Iterator[None]:
    """Raise in all processes, after the block, the error of one that found a non-finite value.

    Otherwise the others would wait for that process for ever. Inside the block, processes must not
    need each other.

    Raises:
        NonFiniteError: A process found a value that is not finite.
    """
    own = None
    try:
        yield
    except NonFiniteError as error:
        own = error
    found = found_by_any(own)
    if found is not None:
        raise found
