"""Settings of the export."""

from dataclasses import dataclass
from typing import Literal

from rlhf.runs.settings import FolderSettings


@dataclass(frozen=True, kw_only=True)
class Config(FolderSettings):
    """Merge an adapter into its base, or take the policy out of a checkpoint; write full
    weights."""

    folder: str
    """Folder that a stage wrote with lora.rank above 0, or a folder RUN/checkpoints/step-N of
    PPO."""
    output_dir: str
    """Folder to write."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the written weights."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base. Set it only for sources that you trust."""
