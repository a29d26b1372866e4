"""Measures what a pass allocates by running it on tensors without data.

torch's fake tensors have a shape, a type and a storage with a size, but no memory. The functions of
the stages run on them unchanged, forward and backward. At every operation, the live storages are
added up. So the numbers hold for every architecture, for packing, for logits in chunks and for
checkpointed activations, and they follow the code. A formula would hold for one architecture only.

Three things are not counted: buffers inside a kernel, memory that the allocator keeps beyond the
tensors, and libraries. The operations are those of a CPU; a GPU's attention keeps about the same.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache, PreTrainedModel

from rlhf.generation.half_weights import half_weights
from rlhf.generation.vllm import full_weights
from rlhf.inputs.packing import PackedRow
from rlhf.models.compat import one_sequence_a_row
from rlhf.models.empty import empty_policy, empty_scalar
from rlhf.models.heads import response_divergence, response_logprobs, response_moments
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import NO_LORA, LoraSettings, ModelSettings


class LiveBytes(TorchDispatchMode):
    """Counts bytes of live storages that operations in the block have made."""

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        """Start at 0 bytes. `existing` tensors, and views of them, do not count."""
        super().__init__()
        self.now = 0
        self.peak = 0
        self._alive = {tensor.untyped_storage()._cdata: 0 for tensor in existing}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._alive:
            return
        self._alive[storage._cdata] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key: int) -> None:
        self.now -= self._alive.pop(key)


class DryRun:
    """Makes models without weights, and measures their passes.

    Every measure is the peak of what a pass allocates, in bytes. Weights and gradients that existed
    before do not count.
    """

    def __init__(self, autocast: torch.dtype | None = None) -> None:
        """Make a dry run. `autocast` is the type of mixed precision; None turns it off."""
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        # An operation that fails on fake tensors raises an error, so torch need not log it too.
        logging.getLogger(FakeTensorMode.__module__).setLevel(logging.CRITICAL)
        self.autocast = autocast

    def policy(
        self, settings: ModelSettings, lora: LoraSettings = NO_LORA, *, is_shared: bool = False
    ) -> PreTrainedModel:
        """See `empty_policy`."""
        with self._fake:
            return empty_policy(settings, lora, is_shared=is_shared)

    def scalar(
        self, settings: ModelSettings, lora: LoraSettings = NO_LORA, *, is_shared: bool = False
    ) -> ScalarModel:
        """See `empty_scalar`."""
        with self._fake:
            return empty_scalar(settings, lora, is_shared=is_shared)

    def sampling(
        self, policy: PreTrainedModel, batch: int, prompt_tokens: int, new_tokens: int
    ) -> tuple[int, int]:
        """Return the peak of sampling, and the size of its cache at the end, in bytes.

        The peak is that of reading the prompts or that of the last step."""
        cache: Any = DynamicCache(config=policy.config)

        def step(num_new: int, num_all: int) -> None:
            ids = torch.zeros(batch, num_new, dtype=torch.long)
            logits = policy(
                input_ids=ids,
                attention_mask=torch.ones(batch, num_all, dtype=torch.long),
                position_ids=ids,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            (logits.float() / 1.0).softmax(-1)

        def sample() -> None:
            with half_weights(policy):
                step(prompt_tokens, prompt_tokens)
                for layer in cache.layers:  # grow the cache to its size before the last step
                    shape = (*layer.keys.shape[:2], new_tokens - 2, layer.keys.shape[-1])
                    layer.update(layer.keys.new_zeros(shape), layer.values.new_zeros(shape))
                step(1, prompt_tokens + new_tokens - 1)

        peak = self._peak([policy], sample)
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        return peak, sum(tensor.nbytes for tensor in tensors)

    def handing_over(self, policy: PreTrainedModel) -> int:
        """Measure giving all weights to an engine that copies them, one after another.

        Only adapters make tensors here, the sums with their layers' weights."""

        def hand_over() -> None:
            with torch.autocast("cpu", enabled=False):
                for _ in full_weights(policy):
                    pass

        return self._peak([policy], hand_over)

    def moments(self, policy: PreTrainedModel, row: PackedRow) -> int:
        """Measure log-probabilities with their entropy."""
        return self._peak([policy], lambda: response_moments(policy, self._emptied(row)))

    def logprobs(self, policy: PreTrainedModel, row: PackedRow) -> int:
        return self._peak([policy], lambda: response_logprobs(policy, self._emptied(row)))

    def values(self, model: ScalarModel, row: PackedRow) -> int:
        def read() -> Tensor:
            empty = self._emptied(row)
            return model(empty.predictors, **empty.model_inputs)

        return self._peak([model], read)

    def training(
        self,
        row: PackedRow,
        policy: PreTrainedModel | None,
        scalar_model: ScalarModel | None,
        accumulates: Sequence[nn.Module],
        teacher: PreTrainedModel | None = None,
    ) -> int:
        """Measure a forward and backward pass of one row through one or both models.

        Args:
            accumulates: Models that already have gradients, from another row. The result includes
                the gradients of the others.
            teacher: A model whose distributions the policy learns, in place of the tokens.
        """

        def of_policy(policy: PreTrainedModel, row: PackedRow) -> Tensor:
            if teacher is None:
                return response_logprobs(policy, row)
            return response_divergence(policy, teacher, row)

        def forward() -> Tensor:
            empty = self._emptied(row)
            parts = [] if policy is None else [of_policy(policy, empty)]
            if scalar_model is not None:
                parts += [scalar_model(empty.predictors, **empty.model_inputs)]
            return torch.stack([part.sum() for part in parts]).sum()

        models = [model for model in (policy, scalar_model) if model is not None]
        return self._trained(models, forward, accumulates, teacher)

    def batch_training(
        self,
        policy: PreTrainedModel,
        rows: int,
        length: int,
        accumulates: Sequence[nn.Module],
        *,
        is_fused: bool = False,
    ) -> int:
        """Measure `training` on a padded batch. A single row has no padding, so it needs no mask.

        Args:
            is_fused: Whether the policy has TRL's fused head, which makes logits in tiles. If not,
                transformers' loss holds all logits at once.
        """

        def forward() -> Tensor:
            ids = torch.zeros(rows, length, dtype=torch.long)
            mask = torch.ones_like(ids) if rows > 1 else None
            inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids}
            if is_fused:
                return -policy(**inputs, fused_lm_head=True).log_probs.sum()
            return policy(**inputs, use_cache=False).loss

        return self._trained([policy], forward, accumulates)

    def _trained(
        self,
        models: Sequence[nn.Module],
        forward: Callable[[], Tensor],
        accumulates: Sequence[nn.Module],
        teacher: nn.Module | None = None,
    ) -> int:
        with self._fake:
            for parameter in (p for model in accumulates for p in model.parameters()):
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
        for model in models:
            model.train()

        def train() -> None:
            with self._mixed():
                loss = forward()
            loss.backward()

        try:
            frozen = [] if teacher is None else [teacher]
            return self._peak([*models, *frozen], train, gradients=True)
        finally:
            for model in models:
                model.eval().zero_grad()

    def _peak(
        self, models: Iterable[nn.Module], run: Callable[[], object], *, gradients: bool = False
    ) -> int:
        existing = [t for m in models for t in (*m.parameters(), *m.buffers())]
        existing += [t.grad for t in existing if t.grad is not None]
        live = LiveBytes(existing)
        mixed = nullcontext() if gradients else self._mixed()  # training wraps its forward pass
        with self._fake, torch.set_grad_enabled(gradients), live, mixed, one_sequence_a_row():
            run()
        return live.peak

    def _mixed(self) -> torch.autocast:
        return torch.autocast("cpu", self.autocast, enabled=self.autocast is not None)

    def _emptied(self, row: PackedRow) -> PackedRow:
        """Return the row without data, except for its segments, which say what is computed."""
        tensors = {
            name: torch.empty_like(value)
            for name, value in vars(row).items()
            if isinstance(value, Tensor) and name in row.__dataclass_fields__ and name != "segments"
        }
        return replace(row, **tensors)  # type: ignore[arg-type]  # only its Tensor fields
