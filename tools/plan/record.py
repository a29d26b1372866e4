"""The plan: what one process holds, the peak of each phase, and the work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf.inputs.packing import PackedRow
from rlhf.measuring.allocations import DryRun
from rlhf.measuring.flops import Work, forward_flops, size_of, training_flops
from rlhf.models.adapters import adapter_weights
from rlhf.models.scalar import ScalarModel
from tools.plan.launch import Launch, bytes_of
from tools.plan.loading import Loading

Turn = tuple[PreTrainedModel | None, ScalarModel | None]
"""The models of a pass."""


@dataclass
class Plan:
    """Bytes of one process, and the FLOPs of its work."""

    launch: Launch
    split: list[nn.Module] = field(default_factory=list)
    """The trained models, which the launcher may split."""
    held: dict[str, int] = field(default_factory=dict)
    """Bytes held all the time, on the device."""
    waiting: dict[str, int] = field(default_factory=dict)
    """Bytes in the host's memory between uses: offloaded models, and what ZeRO-3 offloads."""
    shared: set[str] = field(default_factory=set)
    """Names of those that the processes of a machine share."""
    loading: Loading = field(default_factory=Loading)
    """Host memory while models load."""
    parts: dict[str, int] = field(default_factory=dict)
    """The largest parts of what the phases need."""
    phases: dict[str, int] = field(default_factory=dict)
    """Peak of each phase, including all that is held."""
    work: str = "an update"
    """The work that the FLOPs are for."""
    flops: dict[str, float] = field(default_factory=dict)
    """FLOPs by phase."""

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def host(self) -> dict[str, int]:
        """Bytes that the processes of one machine need together on its host, by time."""
        count = self.launch.num_local_processes
        waiting = [size * (1 if k in self.shared else count) for k, size in self.waiting.items()]
        needs = {
            "while models load": self.loading.peak(count),
            "what is offloaded": sum(waiting),
            "peak of a phase": count * self.peak if self.launch.device == "cpu" else 0,
        }
        return {name: size for name, size in needs.items() if size}

    def load(self, model: PreTrainedModel, dtype: torch.dtype, *, leaves: bool = False) -> bool:
        """Load a model's files in this type, as the next one; return whether processes share it.

        Args:
            leaves: Whether it moves to its device before the next one is loaded. If not, it waits
                for the launcher to split it.
        """
        leaves = leaves and self.launch.device != "cpu"
        return self.loading.add(model, dtype, leaves=leaves, is_once=self.launch.is_fsdp)

    def add_phase(self, name: str, *parts: int) -> None:
        """Add a phase that needs these parts together. If added twice, the larger need counts."""
        needed = sum(self.held.values()) + sum(parts)
        self.phases[name] = max(needed, self.phases.get(name, 0))

    def hold(self, name: str, model: nn.Module, dtype: torch.dtype) -> None:
        """Add the weights of a trained model, whose files are loaded in this type."""
        self.held[f"{name}: weights"] = self.launch.weights(model, dtype)
        if shards := self.launch.weights_on_host(model):
            self.waiting[f"{name}: weights"] = shards

    def hold_on_base(self, name: str, model: PreTrainedModel) -> None:
        """Add the weights of a role: its adapter and head, and the base below them.

        Roles over the same base share it (`rlhf.models.shared_bases`)."""
        own = sum(weight.nbytes for weight in adapter_weights(model).values())
        base = f"base {model.config.name_or_path}, {str(model.dtype).removeprefix('torch.')}"
        if base not in self.held:
            self.load(model, model.dtype, leaves=True)
        size = (bytes_of(model.parameters()) - own) // (1 + self.launch.is_halved)
        self.held[base] = max(self.held.get(base, 0), size)  # a classifier lacks the unembedding
        if own:
            self.held[f"{name}: adapter and head"] = own

    def hold_optimizer(self, name: str, model: nn.Module) -> None:
        """Add a model's optimizer states."""
        place = self.waiting if self.launch.has_optimizer_on_host else self.held
        place[f"{name}: optimizer"] = self.launch.optimizer(model)

    def hold_exchange(self, *models: nn.Module) -> None:
        """Add the buffers of the exchange of gradients, and gradients that are never freed."""
        self.split = list(models)
        if buffers := self.launch.exchange(*models):
            self.held["exchange of gradients"] = buffers
        if self.launch.keeps_gradients:
            place = self.waiting if self.launch.has_optimizer_on_host else self.held
            place["gradients"] = sum(self.launch.gradients(model) for model in models)

    def gradients(self, *models: nn.Module) -> int:
        """Return the bytes of gradients between passes, unless they are held all the time."""
        is_held = self.launch.keeps_gradients
        return 0 if is_held else sum(self.launch.gradients(model) for model in models)

    def add_pass(
        self,
        phase: str,
        dry: DryRun,
        row: PackedRow,
        turn: Turn,
        existing: Sequence[nn.Module],
        *others: int,
        teacher: PreTrainedModel | None = None,
    ) -> int:
        """Add a forward and backward pass of a row through one or both models; return its bytes.

        Args:
            existing: Models that have gradients already.
            others: Bytes of what is held besides.
            teacher: A model whose distributions the policy learns, in place of the tokens.
        """
        models = [model for model in turn if model is not None]

        def run(accumulates: Sequence[nn.Module]) -> int:
            return dry.training(row, *turn, accumulates, teacher)

        return self.add_pass_of(phase, run, models, existing, *others)

    def add_pass_of(
        self,
        phase: str,
        run: Callable[[Sequence[nn.Module]], int],
        models: Sequence[nn.Module],
        existing: Sequence[nn.Module],
        *others: int,
    ) -> int:
        """Add a pass with gradient through these models, which `run` measures; return its bytes."""
        before = existing
        if self.launch.splits_gradients:
            # A whole gradient is gone when its shards are exchanged, so only those are left.
            before = list({*existing, *models})
        own = run([model for model in models if model in before])
        a_pass = self.launch.training_pass(own, models, self.split)
        self.add_phase(phase, self.gradients(*before), *others, a_pass)
        return a_pass

    def add_training(self, model: PreTrainedModel, work: Work, *, is_checkpointed: bool) -> None:
        """Add the FLOPs of forward and backward passes."""
        size = size_of(model)
        again = forward_flops(size, work) if is_checkpointed else 0.0
        self.flops["train"] = training_flops(size, work) + again
