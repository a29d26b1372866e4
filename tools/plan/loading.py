"""Counts the host memory that models take while they load.

Every process loads whole models, one after another. If the files have the type that is asked for,
the weights stay pages of the files, and all processes share them. If not, each process converts
them into memory of its own. Under FSDP2 a machine converts them once, into pages that its processes
share (`rlhf.models.one_copy`).
"""

from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel


@dataclass
class Loading:
    """Host memory of the models that were loaded so far."""

    own: int = 0
    """Bytes of each process."""
    shared: int = 0
    """Bytes that the processes share."""
    most_own: int = 0
    most_shared: int = 0
    """The same with the largest model that has left the host again."""

    def add(
        self, model: PreTrainedModel, dtype: torch.dtype, *, leaves: bool, is_once: bool
    ) -> bool:
        """Add a model whose files are loaded in this type.

        Args:
            leaves: Whether it has left the host when the next one is loaded.
            is_once: Whether a machine converts files of another type once.

        Returns:
            Whether the processes of a machine share its weights.
        """
        size = sum(p.numel() for p in model.parameters()) * dtype.itemsize
        is_shared = is_once or _type_of_files(model) == dtype
        own, shared = (0, size) if is_shared else (size, 0)
        self.most_own = max(self.most_own, self.own + own)
        self.most_shared = max(self.most_shared, self.shared + shared)
        if not leaves:
            self.own += own
            self.shared += shared
        return is_shared

    def peak(self, num_processes: int) -> int:
        """Return the bytes of so many processes of one machine together."""
        return num_processes * self.most_own + self.most_shared


def _type_of_files(model: PreTrainedModel) -> torch.dtype | None:
    """Return the type of the weights on disk, as the config names it, or None."""
    settings, _ = PretrainedConfig.get_config_dict(str(model.config.name_or_path))
    name = settings.get("dtype") or settings.get("torch_dtype")
    return getattr(torch, name) if isinstance(name, str) else None
