"""Compares two gradients that one step sums in the same buffers.

gradients = TwoGradients(state, parameters)
...                          # the passes of the first loss
gradients.end_first()
...                          # the passes of the second loss
found = gradients.compare()    # both norms and their cosine
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rlhf.training import sharding
from rlhf.training.parameters import trained_parameters
from rlhf.training.step import TrainState

_NO_NORM = 1e-30
"""Smallest divisor, in place of a norm of 0."""


@dataclass(frozen=True)
class GradientComparison:
    """Norms and cosine of two gradients, over all processes."""

    first_norm: float
    """after the factor"""
    second_norm: float
    cosine: float
    factor: float
    """what the first gradient was multiplied by"""


class TwoGradients:
    """Keeps a copy of the first of two gradients that a step sums.

    Args:
        parameters: The parameters whose gradients are compared.
    """

    def __init__(self, state: TrainState, parameters: Sequence[nn.Parameter]) -> None:
        self._state = state
        self._parameters = parameters
        self._first: list[Tensor] = []

    def end_first(self) -> None:
        """Copy the gradient so far.

        Sharded gradients are also set to zero, since DeepSpeed may add later ones to them or not.
        """
        state = self._state
        self._first = [one.clone() for one in sharding.local_gradients(self._parameters)]
        if sharding.shards_gradients(state.accelerator):
            trained = trained_parameters(state.module).values()
            sharding.zero_gradients(state.accelerator, state.model, trained)

    def compare(self, ratio: float | None = None) -> GradientComparison:
        """Compare both gradients after the last pass, and leave their sum for the step.

        Args:
            ratio: The first gradient is scaled to this multiple of the second's norm. None leaves
                it as it is.
        """
        accelerator = self._state.accelerator
        is_sharded = sharding.shards_gradients(accelerator)
        first, second = self._first, sharding.local_gradients(self._parameters)
        if not is_sharded:
            if accelerator.num_processes > 1:
                first = [accelerator.reduce(gradient, reduction="mean") for gradient in first]
            second = [total - part for total, part in zip(second, first, strict=True)]
        pairs = [(first, first), (second, second), (first, second)]
        first_square, second_square, product = sharding.inner_products(accelerator, pairs)
        first_norm, second_norm = math.sqrt(first_square), math.sqrt(second_square)
        factor = 1.0 if ratio is None else ratio * second_norm / max(first_norm, _NO_NORM)
        if factor != 1.0 or is_sharded:
            total = [own.add_(part, alpha=factor) for own, part in zip(second, first, strict=True)]
            sharding.set_local_gradients(self._parameters, total)
        return GradientComparison(
            first_norm=first_norm * factor,
            second_norm=second_norm,
            cosine=product / max(first_norm * second_norm, _NO_NORM),
            factor=factor,
        )
