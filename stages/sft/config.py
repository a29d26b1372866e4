"""Settings of supervised fine-tuning."""

from dataclasses import dataclass, field
from typing import Literal

from rlhf.generation.settings import GenerationSettings
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.runs.settings import MayOverwrite
from rlhf.runs.trackers import Tracker
from rlhf.training.settings import OptimSettings


@dataclass(frozen=True, kw_only=True)
class Config(MayOverwrite):
    """Fine-tune a base model on demonstrations.

    The defaults are those of InstructGPT's PPO initialisation where they do not depend on size
    (Ouyang et al. 2022, C.3): 2 epochs, 10 % pretraining text, batches of 32, cosine to 10 % of the
    peak, no warm-up, Adam with betas 0.9 and 0.95.
    """

    model: ModelSettings
    """Base model to start from."""
    demonstrations: str
    """Demonstration records: a .jsonl file, a folder of those, or hub:owner/name."""
    num_demonstrations: int | None = None
    """Read so many demonstrations, drawn at random with the seed. None means all."""
    text: str | None = None
    """Text records to mix in, as for demonstrations. None means that none is."""
    text_share: float = 0.1
    """Share of the trained tokens that are text; 0 only measures text. Unused without text."""
    max_text_tokens: int = 256
    """Documents are cut into pieces of at most so many tokens."""
    held_out: float = 0.05
    """Share of the prompts, and of the documents, that is measured and never trained on."""
    max_held_out: int = 256
    """Measure at most so many held-out demonstrations, and as many held-out pieces of text."""
    max_prompt_tokens: int = 512
    """Longer prompts lose their oldest turns; if the last turn alone is longer, the row goes."""
    max_response_tokens: int = 512
    """Demonstrations with a longer response, its end token included, are dropped. Samples are cut
    here."""
    max_dropped: float = 0.05
    """Stop if a larger share of the demonstrations would be dropped for their length."""
    num_epochs: int = 2
    """Passes over the demonstrations and the text mixed in."""
    batch_size: int = 32
    """Rows per optimizer step, over all processes; a row is a demonstration or a piece of text.
    Where there are fewer rows, a step takes all of them once."""
    micro_batch_size: int = 8
    """Most rows per training pass on each device, padded to the longest. Changes memory and speed,
    never the result."""
    micro_batch_tokens: int = 2048
    """Most tokens of one packed pass when held-out rows and samples are measured."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a third more time."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Train an adapter instead of all weights."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """Optimizer."""
    checkpoint_every: int | None = 50
    """Optimizer steps between checkpoints, from which a run that was cut off goes on when the same
    command is given again. Each takes three times the weights that learn. None writes none."""
    eval_every: int = 50
    """Optimizer steps between measurements; the last step is always measured."""
    choose_by: Literal["held_out_loss", "reward_score"] = "held_out_loss"
    """What chooses among the measured checkpoints: the lowest held-out loss, or the highest mean
    score of samples for held-out prompts, as InstructGPT did (Ouyang et al. 2022, C.1)."""
    reward_model: str | None = None
    """Folder that the rm stage wrote, for choose_by reward_score."""
    num_samples: int = 64
    """Held-out prompts, at most, that are answered by sampling."""
    temperature: float = 1.0
    """Temperature of the samples; 0 takes the likeliest token."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How samples are generated."""
    trackers: list[Tracker] = field(default_factory=list)
    """Where metrics and samples go besides metrics.jsonl and samples.jsonl: tensorboard, wandb."""
    seed: int = 0
    """Root of every random choice."""
    output_dir: str
    """Folder to write."""

    def __post_init__(self) -> None:
        for name in (
            "max_held_out max_prompt_tokens max_response_tokens num_epochs batch_size "
            "micro_batch_size micro_batch_tokens checkpoint_every eval_every num_samples"
        ).split():
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more")
        if self.num_demonstrations is not None and self.num_demonstrations < 2:
            raise ValueError(
                f"num_demonstrations is {self.num_demonstrations}; give 2 or more (one to train "
                "on, one to hold out), or null for all"
            )
        if self.max_text_tokens < 2:
            raise ValueError(f"max_text_tokens is {self.max_text_tokens}; give 2 or more")
        if not 0 <= self.text_share < 1:
            raise ValueError(f"text_share is {self.text_share}; give 0 to below 1, such as 0.1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is {self.held_out}; give a share, such as 0.05")
        if not 0 <= self.max_dropped <= 1:
            raise ValueError(f"max_dropped is {self.max_dropped}; give a share, such as 0.05")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; give 0 or more")
        if (self.choose_by == "reward_score") != (self.reward_model is not None):
            raise ValueError(
                f"choose_by is {self.choose_by} and reward_model is {self.reward_model}; a reward "
                "model is given exactly when choose_by is reward_score"
            )

    def rows_per_pass(self, num_processes: int) -> int:
        """Rows of a training pass of each process: the most, up to micro_batch_size, that make up
        its share of a batch.

        Raises:
            ValueError: the processes cannot share a batch equally.
        """
        own_rows, left = divmod(self.batch_size, num_processes)
        if left:
            raise ValueError(
                f"batch_size is {self.batch_size}, which {num_processes} processes cannot share "
                f"equally; give a multiple of {num_processes}"
            )
        most = min(self.micro_batch_size, own_rows)
        return next(rows for rows in range(most, 0, -1) if own_rows % rows == 0)
