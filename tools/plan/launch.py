"""Says how much memory a launcher takes for a model in each process.

A launcher splits weights, gradients and optimizer states between processes, or leaves them whole
(rlhf/training/sharding.py has the table). Under DDP every process holds all of them. What is split
is gathered for a pass, and gradients go through buffers on their way.

With mixed precision, DeepSpeed turns the models into bfloat16 and keeps fp32 weights besides; FSDP2
keeps fp32 weights only, and gathers them in bfloat16. Both hold the reference in bfloat16.

In a rollout every process gathers the policy until its log-probabilities are known, and later the
value model. With vLLM it gathers one weight at a time to copy it, and the policy only afterwards.
In training FSDP2 gathers layer by layer, and ZeRO-3 up to 1e9 weights. DeepSpeed's numbers are its
defaults, which this project's launcher files leave as they are.

ZeRO-3 can offload: shards of weights, or optimizer states and gradients, are then in the host's
memory. What is gathered, small weights and the buffers of the exchange stay on the device.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import PreTrainedModel

from rlhf.training.parameters import trained_parameters
from rlhf.training.sharding import layers_of

LIVE_WEIGHTS = 10**9
"""Weights that ZeRO-3 holds gathered in a training pass (stage3_max_live_parameters)."""
SMALL_WEIGHTS = 10**5
"""Parameters of at most as many numbers stay whole under ZeRO-3
(stage3_param_persistence_threshold)."""
BUCKET = 5 * 10**8
"""Gradients that ZeRO exchanges at once (reduce_bucket_size)."""


@dataclass(frozen=True)
class Launch:
    """The launcher's settings on which memory depends."""

    num_processes: int = 1
    zero_stage: int = 0
    mixed_precision: str = "no"
    device: str = "cpu"
    is_fsdp: bool = False
    """Whether torch's FSDP2 splits the models."""
    num_machines: int = 1
    offloads_optimizer: bool = False
    """Whether ZeRO-3 holds optimizer states and gradients in the host's memory."""
    offloads_weights: bool = False
    """Whether ZeRO-3 holds its shards of weights in the host's memory."""
    gpu_bytes: int | None = None
    """Memory of a GPU, of which vLLM takes a share. None means that it is not known."""

    @classmethod
    def read(cls, path: Path | None) -> "Launch":
        """Read a file that `accelerate config` wrote. None means one process on this device.

        Raises:
            ValueError, OSError: The file cannot be used.
        """
        try:
            settings = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, RecursionError) as error:
            raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{path} holds no settings; give a file of configs/accelerate")
        kind = settings.get("distributed_type", "NO")
        version = settings.get("fsdp_config", {}).get("fsdp_version", 1)
        if kind == "FSDP" and version != 2:
            raise ValueError(
                f"{path} asks for fsdp_version {version}; give 2, as configs/accelerate/fsdp2.yaml "
                "does"
            )
        deepspeed = settings.get("deepspeed_config", {})
        zero_stage = deepspeed.get("zero_stage", 0)
        # A file for one GPU has the type of a file for one CPU, but it names the GPU.
        names_gpus = settings.get("gpu_ids") not in (None, "")
        has_gpu = torch.cuda.is_available() or names_gpus or kind != "NO"
        return cls(
            num_processes=settings.get("num_processes", 1),
            zero_stage=zero_stage,
            mixed_precision=settings.get("mixed_precision", "no"),
            device="cuda" if has_gpu and not settings.get("use_cpu", False) else "cpu",
            is_fsdp=kind == "FSDP",
            num_machines=settings.get("num_machines", 1),
            offloads_optimizer=_is_offloaded("optimizer", deepspeed, zero_stage, path),
            offloads_weights=_is_offloaded("param", deepspeed, zero_stage, path),
        )

    @property
    def name(self) -> str:
        """What splits the models, or ""."""
        return "FSDP2" if self.is_fsdp else f"ZeRO-{self.zero_stage}" if self.zero_stage else ""

    @property
    def is_alone(self) -> bool:
        """Whether one process holds everything and exchanges nothing."""
        return self.num_processes == 1 and not self.name

    @property
    def num_local_processes(self) -> int:
        """Processes on one machine."""
        return math.ceil(self.num_processes / self.num_machines)

    @property
    def is_halved(self) -> bool:
        """Whether the launcher gives the models bfloat16 weights for their passes."""
        return bool(self.name) and self.mixed_precision != "no"

    @property
    def splits_weights(self) -> bool:
        return self.zero_stage >= 3 or self.is_fsdp

    @property
    def splits_gradients(self) -> bool:
        return self.zero_stage >= 2 or self.is_fsdp

    @property
    def splits_optimizer(self) -> bool:
        return self.zero_stage >= 1 or self.is_fsdp

    def share(self, num_bytes: int, is_split: bool) -> int:
        """Return how many bytes one process holds of something that may be split."""
        return num_bytes // self.num_processes if is_split else num_bytes

    # What is held all the time

    def weights(self, model: nn.Module, dtype: torch.dtype) -> int:
        """Return the bytes of a model's weights.

        Args:
            dtype: The type in which its files are loaded. `model` has the type of its passes.
        """
        if self.is_fsdp:
            trained = _count(trained_parameters(model).values())
            frozen = _count(model.parameters()) - trained
            master = torch.float32 if self.is_halved else dtype
            return self.share(trained * master.itemsize + frozen * dtype.itemsize, True)
        whole = sum(p.nbytes for p in _small(model)) if self.splits_weights else 0
        shards = self.share(bytes_of(model.parameters()), self.splits_weights)
        return whole + (0 if self.weights_on_host(model) else shards)

    def weights_on_host(self, model: nn.Module) -> int:
        """Return the bytes of a model's shards that are offloaded."""
        is_offloaded = self.offloads_weights and self.device != "cpu"
        return self.share(bytes_of(model.parameters()), True) if is_offloaded else 0

    @property
    def has_optimizer_on_host(self) -> bool:
        """Whether optimizer states and gradients are offloaded."""
        return self.offloads_optimizer and self.device != "cpu"

    def optimizer(self, model: nn.Module) -> int:
        """Return the bytes of Adam's moments, and of DeepSpeed's own copy of the weights.

        DeepSpeed keeps that copy in float32, even where the weights are in float32. Offloaded, a
        float32 copy of the gradients belongs to them too.
        """
        copies = (self.zero_stage > 0) + self.has_optimizer_on_host
        return self.share((2 + copies) * self.trained(model), self.splits_optimizer)

    def exchange(self, *models: nn.Module) -> int:
        """Return the bytes of the buffers for gradients that a launcher never frees."""
        if self.zero_stage >= 3:
            return self._bucket(*models)
        is_ddp = self.num_processes > 1 and not self.name
        return sum(self.trained(model) for model in models) if is_ddp else 0

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients are never freed."""
        return self.zero_stage >= 3

    # What a step holds

    def trained(self, model: nn.Module) -> int:
        """Return the bytes of all trained weights in the type in which the optimizer has them."""
        as_type = torch.float32 if self.is_halved else None
        return bytes_of(trained_parameters(model).values(), as_type)

    def gradients(self, model: nn.Module) -> int:
        """Return the bytes of a model's gradients between passes."""
        is_half = self.zero_stage > 0 and self.is_halved
        return self.share(self.trained(model) // (1 + is_half), self.splits_gradients)

    def gradients_not_exchanged(self, model: nn.Module) -> int:
        """Return the bytes of a model's gradients between passes that exchange none.

        FSDP2 then keeps whole gradients in float32 on every process."""
        return self.trained(model) if self.is_fsdp else self.gradients(model)

    def set_aside(self, model: nn.Module) -> int:
        """Return the bytes of a copy of a model's gradients, which is in float32."""
        return self.share(self.trained(model), self.splits_gradients)

    def step(self, *models: nn.Module) -> int:
        """Return the bytes of the optimizer's temporaries, one model at a time.

        Clipping shards needs less: it reads and scales one gradient after another.
        """
        largest = max(self.trained(model) for model in models)
        if self.splits_gradients:
            return self.share(largest, True)
        if self.device == "cpu":
            return 2 * max(p.nbytes for m in models for p in trained_parameters(m).values())
        return self.share(largest, self.splits_optimizer)

    # What passes gather

    def gathered(self, model: nn.Module, *others: nn.Module) -> int:
        """Return the bytes of the weights that a process gathers to run a model outside training.

        Args:
            others: Models that are split together with it. FSDP2 keeps all weights outside layers
                in one group, and gathers them together.
        """
        if self.is_fsdp:
            roots = sum(_count(_root(one)) for one in (model, *others))
            inside = _count(model.parameters()) - _count(_root(model))
            return (roots + inside) * self._itemsize(model)
        if self.zero_stage >= 3:
            return bytes_of(model.parameters()) - bytes_of(_small(model))
        return 0

    def gathered_to_copy(
        self, model: nn.Module, sources: Iterable[Sequence[str]], dtype: torch.dtype
    ) -> int:
        """Return the bytes that a process gathers to hand a split model's weights over.

        They are gathered one after another (rlhf/training/streaming.py). vLLM's loop still holds
        one when it asks for the next, so two of them are whole.

        Args:
            sources: The names of the parameters that are gathered for each weight, in their order.
            dtype: The type of the copy, in which FSDP2 gathers them.
        """
        if not self.splits_weights:
            return 0
        small = 0 if self.is_fsdp else SMALL_WEIGHTS
        size = dtype.itemsize if self.is_fsdp else self._itemsize(model)
        counts = [
            sum(n for name in names if (n := model.get_parameter(name).numel()) > small)
            for names in sources
        ]
        return max(map(sum, pairwise([0, *counts]))) * size

    def training_pass(
        self, a_pass: int, models: Sequence[nn.Module], split: Sequence[nn.Module]
    ) -> int:
        """Return the bytes of a pass with gradient, whose own tensors take `a_pass` bytes.

        Args:
            models: Those of the pass.
            split: All that are split together.
        """
        if self.is_fsdp:
            first, *others = split
            if isinstance(first, PreTrainedModel) and not others:
                return self._pass_of_bare_fsdp(a_pass, first)
            return self._pass_of_fsdp(a_pass, models, split)
        if self.zero_stage >= 3:
            weights = sum(_count(m.parameters()) - _count(_small(m)) for m in models)
            live = min(weights, LIVE_WEIGHTS) * self._itemsize(models[0])
            # Gradients are laid side by side for the exchange, in a copy of the bucket. On a CPU,
            # gloo makes another.
            copies = 2 if self.device == "cpu" else 1
            return live + max(a_pass, copies * self._bucket(*models))
        if self.zero_stage == 2:
            return a_pass + self._bucket(*models)
        return a_pass

    def _pass_of_fsdp(
        self, a_pass: int, models: Sequence[nn.Module], split: Sequence[nn.Module]
    ) -> int:
        """Return a pass under FSDP2.

        The root, which has all weights outside layers, is gathered from the begin of the pass to
        its end, where its gradients are copied to float32 for the exchange. In the backward pass
        two layers are gathered at a time, one has gradients, and those of the layer before are
        exchanged in float32.
        """
        size = self._itemsize(models[0])
        layer = max(_count(layer.parameters()) for model in models for layer in layers_of(model))
        trained = [p for model in models for p in _root(model) if p.requires_grad]
        head = max((p.numel() for p in trained), default=0)
        whole = sum(_count(_root(model)) for model in split) + head
        at_end = _count(trained) * (size + 4) + layer * 4
        return max(a_pass + whole * size + layer * (3 * size + 4), at_end)

    def _pass_of_bare_fsdp(self, a_pass: int, model: PreTrainedModel) -> int:
        """Return a pass under FSDP2 of a model that no module of ours wraps, as SFT trains it.

        accelerate finds its embedding and its head, and FSDP2 gathers each on its own. At the
        begin of the backward pass the head is there with its gradient, and the embedding is not.
        At the end only the embedding is there.
        """
        size = self._itemsize(model)
        layer = max(_count(layer.parameters()) for layer in layers_of(model))
        embedding: Any = model.get_input_embeddings().weight
        head = model.get_output_embeddings()
        is_tied = head is not None and head.weight is embedding
        tail = _count(p for p in _root(model) if is_tied or p is not embedding)
        last = embedding.numel() if embedding.requires_grad else 0
        at_end = embedding.numel() * size + last * (size + 4) + layer * 4
        return max(a_pass + 2 * tail * size + layer * (3 * size + 4), at_end)

    def _bucket(self, *models: nn.Module) -> int:
        """Return the bytes of ZeRO's bucket. On a CPU, memory that is not written takes none."""
        trained = sum(_count(trained_parameters(model).values()) for model in models)
        count = BUCKET if self.device == "cuda" else min(BUCKET, trained)
        return count * self._itemsize(models[0])

    def _type(self, model: nn.Module) -> torch.dtype:
        return torch.bfloat16 if self.is_halved else next(model.parameters()).dtype

    def _itemsize(self, model: nn.Module) -> int:
        return self._type(model).itemsize


def _is_offloaded(name: str, deepspeed: dict[str, Any], zero_stage: int, path: Path | None) -> bool:
    """Return whether a launcher's file offloads the optimizer, or the parameters ("param")."""
    device = deepspeed.get(f"offload_{name}_device", "none")
    if device != "none" and (device != "cpu" or zero_stage != 3):
        raise ValueError(
            f"{path} offloads {name} to {device} under ZeRO-{zero_stage}; the plan knows "
            "offloading to cpu under ZeRO-3 only"
        )
    return device == "cpu"


def bytes_of(weights: Iterable[nn.Parameter], as_type: torch.dtype | None = None) -> int:
    """Return the bytes of weights in their own type, or in another."""
    return sum(p.numel() * (p.dtype if as_type is None else as_type).itemsize for p in weights)


def _count(weights: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in weights)


def _small(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.numel() <= SMALL_WEIGHTS]


def _root(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters outside layers."""
    inside = {id(p) for layer in layers_of(model) for p in layer.parameters()}
    return [p for p in model.parameters() if id(p) not in inside]
