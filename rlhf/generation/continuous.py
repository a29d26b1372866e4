"""Provides the engine `continuous`: transformers' continuous batching over a paged cache."""

import math
from collections.abc import Callable, Sequence

import torch
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.continuous_batching import ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput

from rlhf.generation.interface import Decoding, Samples
from rlhf.generation.settings import GenerationSettings
from rlhf.models.architectures import accepts
from rlhf.training.nonfinite import NonFiniteError

_PAGED = {DynamicLayer, DynamicSlidingWindowLayer}

PREFILL_TOKENS = 1024
"""The most prompt tokens that one pass reads. Longer prompts take several passes."""


class ContinuousEngine:
    """Gives the place of every response that ends to a waiting prompt.

    That pays if there are many more prompts than `batch_size` and lengths differ much. Sampling
    runs in its own thread, which autocast does not reach, so it computes in the type of the
    weights. Draws come from torch's global generator. Each call seeds it from the given generator
    and restores it afterwards, so one seed gives the same draws on the same machine.

    Tested on the CPU, where it is slower than `hf`. Not tested on CUDA.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        self.batch_size = settings.batch_size
        self.policy: PreTrainedModel

    def refresh(self, policy: PreTrainedModel) -> None:
        """Raise ValueError if a layer keeps anything other than keys and values."""
        layers = {type(layer) for layer in DynamicCache(config=policy.config).layers}
        if not accepts(policy, "past_key_values") or not layers <= _PAGED:
            raise ValueError(
                f"generation.engine is continuous, which pages keys and values only, and "
                f"{type(policy).__name__} has a state of another kind; give hf"
            )
        self.policy = policy

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """See `Engine.generate`."""
        if not prompts or decoding.max_new_tokens == 0:
            return Samples([[] for _ in prompts], [[] for _ in prompts])
        device = self.policy.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            manager = self._manager(prompts, decoding, generator)
            # All requests wait before the thread starts. Otherwise timing would decide which of
            # them share a pass, and so which draws they get.
            names = manager.add_requests([list(prompt) for prompt in prompts])
            manager.start()
            try:
                outputs = _collect(manager, len(names), progress or (lambda _: None))
            finally:
                manager.stop(block=True)
                manager.destroy()
        return Samples(
            [outputs[name].generated_tokens for name in names],
            [outputs[name].logprobs for name in names],
        )

    def _manager(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        generator: torch.Generator | None,
    ) -> ContinuousBatchingManager:
        # A new GenerationConfig, because the model's own may hold filters such as top-k.
        do_sample = decoding.temperature > 0
        generation_config = GenerationConfig(
            max_new_tokens=decoding.max_new_tokens,
            eos_token_id=decoding.ends,
            do_sample=do_sample,
            **({"temperature": decoding.temperature} if do_sample else {}),
        )
        num_rows = min(self.batch_size, len(prompts))
        config = ContinuousBatchingConfig(
            max_requests_per_batch=num_rows,
            max_batch_tokens=max(num_rows, PREFILL_TOKENS),
            return_logprobs=True,
            seed=int(torch.randint(2**31, (), generator=generator)),
            auto_switch_to_flash=self.policy.dtype != torch.float32,  # flash takes only half types
        )
        longest = max(len(prompt) for prompt in prompts) + decoding.max_new_tokens
        config.num_blocks = num_rows * math.ceil(longest / config.page_size)
        return self.policy.init_continuous_batching(generation_config, config)  # type: ignore[operator]


def _collect(
    manager: ContinuousBatchingManager, count: int, progress: Callable[[int], object]
) -> dict[str, GenerationOutput]:
    """Wait for the outputs of all requests and return them by name."""
    outputs: dict[str, GenerationOutput] = {}
    while len(outputs) < count:
        output = manager.get_result(timeout=1.0)
        if output is None:
            if not manager.is_running():
                raise RuntimeError("continuous batching stopped before all responses were there")
            progress(0)
        elif any(map(math.isnan, output.logprobs)) or "nan" in (output.error or ""):
            raise NonFiniteError("logits", "rollout")
        elif output.error is not None:
            raise RuntimeError(f"continuous batching failed: {output.error}")
        else:
            outputs[output.request_id] = output
            progress(1)
    return outputs
