"""Provides the engine `vllm`: vLLM in the training process, on its GPU."""

import copy
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.generation.interface import Decoding, Samples
from rlhf.generation.settings import GenerationSettings
from rlhf.training.nonfinite import NonFiniteError
from rlhf.training.streaming import gathered, whole_shape

SINGLE_PROCESS_VARIABLES = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",  # any free port
}
"""Variables that a launcher would set for a single process."""


class VllmEngine:
    """Runs one vLLM per process, with a copy of the weights in the type of the forward pass.

    It was not tested on a GPU. Its tests use a fake module that accepts only the signatures of vLLM
    0.30. The given generator seeds every call of `generate`. Two runs can still differ, because
    some kernels' results depend on the batch. Log-probabilities differ more from the trainer's than
    those of the other engine.

    All training processes must start it and sample together, because vLLM joins all of them. They
    must refresh it together too, if a launcher splits the policy: `refresh` then gathers one weight
    after another, and lets each go before the next.
    """

    copies_weights = True

    def __init__(self, settings: GenerationSettings) -> None:
        """Raise ValueError if vLLM cannot run here."""
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                "generation.engine is vllm, which is not installed; pip install "
                "'instruct-rlhf[vllm]', or choose hf"
            ) from error
        if not torch.cuda.is_available():
            raise ValueError(
                "generation.engine is vllm, and there is no CUDA GPU that it could use; choose hf"
            )
        self.vllm: Any = vllm
        self.settings = settings
        self.llm: Any = None
        self.is_asleep = False
        self.dtype: torch.dtype
        self.shapes: dict[str, torch.Size] = {}

    def refresh(self, policy: PreTrainedModel) -> None:
        """Copy the weights; the first call starts vLLM.

        Raises:
            ValueError: The policy has another shape than the first one.
        """
        shapes = {
            name: whole_shape(policy.get_parameter(own_name))
            for name, (own_name, *_) in sources_of(policy).items()
        }
        if self.llm is None:
            self.llm, self.shapes = self._start(policy), shapes
        elif shapes != self.shapes:
            raise ValueError(
                "generation.engine is vllm, which holds models of one shape in a process, and this "
                f"policy's is another ({policy.config.name_or_path}); choose hf"
            )
        if self.is_asleep:
            self.llm.wake_up(tags=["weights"])
        weights = full_weights(policy, self.dtype)
        with torch.autocast("cuda", enabled=False):
            self.llm.apply_model(lambda model: model.load_weights(weights))
        if self.is_asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.is_asleep = False
        self.llm.reset_prefix_cache()  # it holds keys and values from the old weights

    def release(self) -> None:
        """Put vLLM to sleep: its weights and its cache leave the GPU."""
        if self.llm is not None and not self.is_asleep:
            self.llm.sleep(level=2)  # drops the weights, which `refresh` copies again
            self.is_asleep = True

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
        sampling = self.vllm.SamplingParams(
            temperature=decoding.temperature,
            max_tokens=decoding.max_new_tokens,
            stop_token_ids=decoding.ends,
            ignore_eos=True,  # a response ends only at stop_token_ids
            logprobs=0,  # the sampled token's only
            detokenize=False,
        )
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        seed = int(torch.randint(2**31, (), generator=generator))
        with torch.autocast("cuda", enabled=False), _seeded(seed):
            answers = self.llm.generate(inputs, sampling, use_tqdm=False)
        outputs = [answer.outputs[0] for answer in answers]
        if progress is not None:
            progress(len(prompts))
        responses = [list(output.token_ids) for output in outputs]
        logprobs = [
            [step[token].logprob for token, step in zip(response, output.logprobs, strict=True)]
            for response, output in zip(responses, outputs, strict=True)
        ]
        if any(math.isnan(nats) for row in logprobs for nats in row):
            raise NonFiniteError("logits", "rollout")
        return Samples(responses, logprobs)

    def _start(self, policy: PreTrainedModel) -> Any:
        """Start a vLLM for this architecture, without real weights."""
        # vLLM runs in this process, so that weights are copied from tensor to tensor. If there are
        # several processes, their launcher has set the variables in SINGLE_PROCESS_VARIABLES.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        for name, value in SINGLE_PROCESS_VARIABLES.items():
            os.environ.setdefault(name, value)
        config = copy.deepcopy(policy.config)
        config.architectures = [type(policy).__name__]
        is_mixed = torch.is_autocast_enabled("cuda")
        self.dtype = torch.get_autocast_dtype("cuda") if is_mixed else policy.dtype
        with tempfile.TemporaryDirectory() as folder, torch.autocast("cuda", enabled=False):
            config.save_pretrained(folder)
            return self.vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",  # ignores filters in a model's folder, such as top-k
                dtype=self.dtype,
                distributed_executor_backend="external_launcher",
                gpu_memory_utilization=self.settings.vllm_memory_share,
                max_num_seqs=self.settings.batch_size,
                max_model_len=-1,  # the model's context, or as much of it as fits in memory
                logprobs_mode="processed_logprobs",  # at the sampling temperature
                enable_sleep_mode=True,
            )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, from which vLLM draws in this process; restore them afterwards.

    A seed per request would leave them alone, but turn off vLLM's fast samplers.
    """
    before = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before)


def full_weights(
    policy: PreTrainedModel, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight by its name in a full model; shared weights come once.

    A LoRA layer's weight is W + alpha / rank * B A of the adapters that are on.

    If the policy is split between processes, all of them must take all weights. Each weight is
    gathered when it is asked for, a LoRA layer's together with A and B, and is split again when the
    next one is. A caller that keeps it keeps its memory.

    Args:
        dtype: See `rlhf.training.streaming.gathered`.
    """
    layers = _lora_layers(policy)
    for name, sources in sources_of(policy).items():
        with gathered(policy, sources, dtype):
            # No variable holds the weight, because it would live until the next one is gathered.
            yield name, _adapted(policy.get_parameter(sources[0]).detach(), layers.get(name))


def sources_of(policy: PreTrainedModel) -> dict[str, list[str]]:
    """Map the name of each weight in a model without adapters to the parameters that make it.

    The first is the weight's own, and the others are those of the adapters that are on."""
    plain = {
        name.replace(".base_layer.", "."): [name]
        for name, _ in policy.named_parameters()
        if ".lora_" not in name
    }
    for name, layer in _lora_layers(policy).items():
        factors = [one for one, _ in layer.named_parameters() if one.startswith("lora_")]
        plain[name] += [f"{name.removesuffix('weight')}{factor}" for factor in factors]
    return plain


def _lora_layers(policy: PreTrainedModel) -> dict[str, Any]:
    """Map the name of a weight in a model without adapters to its LoRA layer, if that is on."""
    return {
        f"{name}.weight": layer
        for name, layer in policy.named_modules()
        if isinstance(layer, LoraLayer) and not layer.disable_adapters
    }


@torch.no_grad()
def _adapted(weight: Tensor, layer: Any) -> Tensor:
    """Add what a LoRA layer's adapters change; None is a layer without adapters."""
    if layer is None:
        return weight
    return weight + sum(map(layer.get_delta_weight, layer.active_adapters))
