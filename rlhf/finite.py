"""Telling where the first NaN or infinite value stands."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlhf.packing import PromptTree


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


def require_finite(tensors: Mapping[str, Tensor], trees: Sequence[PromptTree], phase: str) -> None:
    """Every tensor, (batch,) or (batch, time) in the order of the trees, is finite.

    Raises:
        NonFiniteError: naming the first tensor that is not, and its first tree.
    """
    for name, tensor in tensors.items():
        bad = (~tensor.isfinite()).reshape(len(trees), -1).any(1)
        if bad.any():
            raise NonFiniteError(name, phase, trees[int(bad.nonzero()[0, 0])])
