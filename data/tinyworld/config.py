"""Settings of the program that makes the tiny world."""

from dataclasses import dataclass

from rlhf.inputs.ranges import PositiveInt
from rlhf.runs.settings import FolderSettings


@dataclass(frozen=True, kw_only=True)
class TinyWorldConfig(FolderSettings):
    """Write the tiny world's texts, demonstrations, prompts and probes into a folder."""

    output_dir: str
    """Folder to write."""
    seed: int = 0
    """Seed of every random choice. The same seed gives the same files, byte for byte."""
    num_texts: PositiveInt = 11300
    """Documents of text.jsonl (pretraining and ptx)."""
    num_texts_held_out: PositiveInt = 200
    """Documents of text_held_out.jsonl."""
    num_demonstrations: PositiveInt = 3000
    """Rows of demonstrations.jsonl (SFT)."""
    num_prompts_rm: PositiveInt = 1400
    """Rows of prompts_rm.jsonl, to sample and rank responses for the reward model."""
    num_prompts_ppo: PositiveInt = 2000
    """Rows of prompts_ppo.jsonl."""
    num_prompts_held_out: PositiveInt = 512
    """Rows of prompts_held_out.jsonl (evaluation)."""
