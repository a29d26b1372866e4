"""Settings of the sft stage."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.ranges import NotNegative, PositiveInt, Range, Share, ShareBetween, TwoOrMore
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.runs.settings import StageSettings
from rlhf.runs.trackers import Tracker
from rlhf.training.settings import OptimSettings


@dataclass(frozen=True, kw_only=True)
class Config(StageSettings):
    """Fine-tune a base model on demonstrations.

    Defaults that do not depend on the model's size are those of InstructGPT's PPO initialisation
    (Ouyang et al. 2022, C.3): 2 epochs, 10 % pretraining text, batches of 32, a cosine to 10 % of
    the peak learning rate, no warm-up, and Adam with betas 0.9 and 0.95.
    """

    model: ModelSettings
    """Base model to start from."""
    demonstrations: str
    """Demonstration records: a .jsonl file, a folder of those, or hub:owner/name."""
    num_demonstrations: TwoOrMore | None = None
    """Demonstrations to read, drawn at random with the seed. None means all."""
    text: str | None = None
    """Text records to mix in: a .jsonl file, a folder of those, or hub:owner/name. None means no
    text."""
    text_share: Annotated[float, Range(low=0, below=1)] = 0.1
    """Share of the trained tokens that are text. With 0, text is measured only. Unused without
    text."""
    max_text_tokens: TwoOrMore = 256
    """Most tokens of a piece of text. Longer documents are cut into pieces."""
    held_out: ShareBetween = 0.05
    """Share of the prompts, and of the documents, kept out of training to measure on."""
    max_held_out: PositiveInt = 256
    """Most held-out demonstrations to measure, and most held-out pieces of text."""
    max_prompt_tokens: PositiveInt = 512
    """Most tokens of a prompt. Longer prompts lose their oldest turns. A demonstration whose last
    turn alone is longer is dropped."""
    max_response_tokens: PositiveInt = 512
    """Most tokens of a response, its end token included. Demonstrations with a longer one are
    dropped. Samples are cut at this length."""
    max_dropped: Share = 0.05
    """Largest share of the demonstrations that may be dropped for their length. The run stops above
    it."""
    num_epochs: PositiveInt = 2
    """Passes over the demonstrations and the text mixed in."""
    batch_size: PositiveInt = 32
    """Rows in an optimizer step, over all processes. A row is a demonstration or a piece of text.
    If there are fewer rows, a step takes all of them once."""
    micro_batch_size: PositiveInt = 8
    """Most rows in a training pass on each device, padded to the longest. It changes memory and
    speed, never the result."""
    micro_batch_tokens: PositiveInt = 2048
    """Most tokens in one packed pass when held-out rows and samples are measured."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: takes less memory and about a third more time."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Train an adapter instead of all weights."""
    optim: OptimSettings = field(default_factory=OptimSettings)
    """Optimizer."""
    checkpoint_every: PositiveInt | None = 50
    """Optimizer steps between checkpoints. An interrupted run continues from the last one when the
    same command is given again. A checkpoint takes three times the size of the trained weights.
    None means no checkpoints."""
    eval_every: PositiveInt = 50
    """Optimizer steps between measurements. The last step is always measured."""
    choose_by: Literal["held_out_loss", "reward_score"] = "held_out_loss"
    """How to choose among the measured checkpoints: held_out_loss takes the lowest held-out loss.
    reward_score takes the highest mean score of samples for held-out prompts, as InstructGPT did
    (Ouyang et al. 2022, C.1)."""
    reward_model: str | None = None
    """Folder that the rm stage wrote, for choose_by reward_score."""
    num_samples: PositiveInt = 64
    """Most held-out prompts to sample a response for."""
    temperature: NotNegative = 1.0
    """Temperature of the samples. 0 takes the likeliest token."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """The engine that samples."""
    trackers: list[Tracker] = field(default_factory=list)
    """Where metrics and samples go besides metrics.jsonl and samples.jsonl: tensorboard, wandb."""
    seed: int = 0
    """Seed of every random choice."""
    output_dir: str
    """Folder to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.choose_by == "reward_score") != (self.reward_model is not None):
            raise ValueError(
                f"choose_by is {self.choose_by} and reward_model is {self.reward_model}; a reward "
                "model is given exactly when choose_by is reward_score"
            )

    def rows_per_pass(self, num_processes: int) -> int:
        """Return the rows of a training pass on each process.

        It is the largest number up to micro_batch_size that divides a process's share of a batch.

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
