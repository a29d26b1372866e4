"""Settings of the pretrain stage."""

from dataclasses import dataclass, field
from typing import Literal

from rlhf.inputs.ranges import PositiveInt
from rlhf.runs.settings import StageSettings
from rlhf.runs.trackers import Tracker
from rlhf.training.settings import OptimSettings


@dataclass(frozen=True, kw_only=True)
class ArchitectureSettings:
    """Shape of the new model, in transformers' terms."""

    model_type: Literal["llama", "mistral", "qwen3"] = "llama"
    """Architecture as transformers names it."""
    hidden_size: int = 128
    """Width of the model."""
    num_hidden_layers: int = 4
    """Transformer blocks."""
    num_attention_heads: int = 4
    """Attention heads. The number must divide hidden_size."""
    num_key_value_heads: int = 4
    """Heads of keys and values. The number must divide num_attention_heads."""
    intermediate_size: int = 384
    """Width of the feed-forward layer."""
    max_position_embeddings: int = 512
    """Longest sequence in tokens, in all stages that build on this model."""
    tie_word_embeddings: bool = True
    """Use the input embedding as the output layer."""

    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def __post_init__(self) -> None:
        for wide, narrow in (
            ("hidden_size", "num_attention_heads"),
            ("num_attention_heads", "num_key_value_heads"),
        ):
            width, heads = getattr(self, wide), getattr(self, narrow)
            if heads < 1 or width < 1 or width % heads:
                raise ValueError(f"{wide} is {width}, not a multiple of {narrow} {heads}")


@dataclass(frozen=True, kw_only=True)
class Config(StageSettings):
    """Train a tokenizer and a small causal language model on plain text."""

    text_path: str
    """Text records to learn from."""
    text_held_out_path: str
    """Text records to measure the loss on."""
    facts_path: str | None = None
    """Prompt records with fact probes (see rlhf/measuring/fact_recall.py). None means that recall
    is not measured."""
    output_dir: str
    """Folder of the run. The model is saved in it."""
    vocab_size: int = 1152
    """Most tokens in the tokenizer's vocabulary."""
    block_length: int = 128
    """Tokens in one training row. Documents are joined and cut into such rows."""
    batch_size: PositiveInt = 16
    """Rows in an update, over all processes."""
    num_epochs: PositiveInt = 6
    """Passes over the text."""
    architecture: ArchitectureSettings = field(default_factory=ArchitectureSettings)
    """Shape of the model."""
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(learning_rate=3e-3))
    """Optimizer."""
    log_steps: PositiveInt = 10
    """Steps between two rows of metrics.jsonl."""
    checkpoint_every: PositiveInt | None = 100
    """Steps between checkpoints. An interrupted run continues from the last one when the same
    command is given again. A checkpoint takes three times the size of the weights. None means no
    checkpoints."""
    eval_steps: PositiveInt = 100
    """Steps between two measurements of held-out loss and fact recall. The last step is always
    measured."""
    trackers: list[Tracker] = field(default_factory=list)
    """Where metrics and samples go besides metrics.jsonl and samples.jsonl: tensorboard, wandb."""
    seed: int = 0
    """Seed of the weights and of the order of the rows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        longest = self.architecture.max_position_embeddings
        if not 2 <= self.block_length <= longest:
            raise ValueError(
                f"block_length is {self.block_length}; give 2 to max_position_embeddings {longest}"
            )
