"""Settings of the program that samples text from a base model."""

from dataclasses import dataclass, field

from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.ranges import Positive, PositiveInt
from rlhf.models.settings import ModelSettings
from rlhf.runs.settings import FolderSettings


@dataclass(frozen=True, kw_only=True)
class ReplayConfig(FolderSettings):
    """Write documents that a base model samples, to train on and held out."""

    output_dir: str
    """Folder to write."""
    model: ModelSettings
    """The base model."""
    document_start: str | None = None
    """Special token that documents began with in pretraining, such as <|endoftext|>. Give PPO the
    same as ptx.document_start. None means the tokenizer's BOS (or EOS) token."""
    num_texts: PositiveInt = 400
    """Documents of text.jsonl."""
    num_texts_held_out: PositiveInt = 40
    """Documents of text_held_out.jsonl."""
    max_tokens: PositiveInt = 256
    """Length at which a document is cut."""
    temperature: Positive = 1.0
    """Sampling temperature. Only at 1 do the documents follow the model's own distribution."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """The engine that samples."""
    seed: int = 0
    """Seed of the draws."""
