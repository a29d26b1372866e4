"""Measure a step of decoding, and the cache that it reads."""

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from benchmarks.gpu_check.models import (
    PRECISIONS,
    Precision,
    autocast,
    load,
    prompts,
    release_memory,
)
from benchmarks.gpu_check.records import Emit, Row, emit_filled
from benchmarks.gpu_check.setting import Setting
from rlhf.generation.hf import LoopEngine
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training.out_of_memory import OutOfMemoryError

NO_END = -1
"""An end token that is never drawn, so that every response has its full length."""


class CacheWatch:
    """Notes dtype and bytes of the cache that a policy was last called with."""

    def __init__(self, policy: PreTrainedModel) -> None:
        self.dtype = "no cache"
        self.num_bytes = 0
        policy.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, __: Any, inputs: dict[str, Any], ___: Any) -> None:
        cache = inputs.get("past_key_values")
        if cache is not None:
            tensors = [one for layer in cache.layers for one in (layer.keys, layer.values)]
            self.dtype = "/".join(sorted({str(one.dtype) for one in tensors}))
            self.num_bytes = sum(one.nbytes for one in tensors)


def decoding(setting: Setting, emit: Emit) -> None:
    """Report milliseconds a step for each precision and batch."""
    for precision in PRECISIONS:
        policy = load(setting, precision)
        for batch in setting.sizes.decoded_batches:
            row: Row = {"precision": precision, "responses": batch}
            emit_filled(emit, row, partial(measure, setting, policy, precision), OutOfMemoryError)
            release_memory()
        del policy


def measure(setting: Setting, policy: PreTrainedModel, precision: Precision, row: Row) -> None:
    """Add to a row the milliseconds and the cache of a step for its number of responses."""
    cache = CacheWatch(policy)
    batch = row["responses"]
    assert isinstance(batch, int)
    with autocast(precision):
        row["ms a step"] = 1000 * seconds_per_step(setting, policy, batch)
    row["cache"], row["cache, MB"] = cache.dtype, cache.num_bytes / 1e6


def seconds_per_step(setting: Setting, policy: PreTrainedModel, batch: int) -> float:
    """Return the seconds of a step after the first, which reads the prompts."""
    engine = LoopEngine(GenerationSettings(batch_size=batch))
    engine.refresh(policy)
    sizes = setting.sizes
    texts = prompts(setting, [sizes.prompt_tokens[1]] * batch)
    stopwatch = Stopwatch(policy.device)

    def seconds(num_tokens: int) -> float:
        how = Decoding(end_id=NO_END, max_new_tokens=num_tokens, temperature=1.0)
        with stopwatch.phase("rollout"):
            engine.generate(texts, how, torch.Generator().manual_seed(0))
        return stopwatch.take()["rollout"]

    seconds(2)  # loads kernels, and finds out how the policy can be sampled
    first = seconds(1)
    return (seconds(1 + sizes.decoded_tokens) - first) / sizes.decoded_tokens
