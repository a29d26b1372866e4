"""Settings of the rm stage; the defaults are InstructGPT's."""

from dataclasses import dataclass, field

from rlhf.inputs.ranges import NotNegative, PositiveInt, Share, ShareBetween, TwoOrMore
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.runs.settings import StageSettings
from rlhf.runs.trackers import Tracker
from rlhf.training.settings import OptimSettings


@dataclass(frozen=True, kw_only=True)
class Config(StageSettings):
    """Reward model: learn from rankings which response to a prompt people prefer."""

    output_dir: str
    """Folder of this run: the reward model, reward.json, metrics.jsonl, results.json."""
    model: ModelSettings
    """The SFT model. A new head replaces its unembedding."""
    rankings: list[str]
    """Files, folders or hub ids of ranking records. All of them are joined."""
    held_out: ShareBetween | None = None
    """Share of the prompts (0 to 1) kept out of training to measure on. None means that
    held_out_rankings names the records to measure on."""
    held_out_rankings: list[str] | None = None
    """Ranking records to measure on. Their prompts are taken out of the training set. None means
    that held_out gives the share."""
    max_rankings: PositiveInt | None = None
    """Rankings to draw at random from each source of rankings. None means all."""
    max_held_out: PositiveInt | None = None
    """Rankings to draw at random from each source of held_out_rankings. None means all."""
    demonstrations: str
    """Demonstration records. The bias is set so that their mean score is 0."""
    num_demonstrations: PositiveInt = 512
    """Most demonstrations to draw for the bias."""
    batch_size: PositiveInt = 64
    """Prompts in an optimizer step, over all processes, each with all of its pairs."""
    micro_batch_tokens: PositiveInt = 4096
    """Most tokens in one pass on one process. It changes no result. A longer ranking is not cut; it
    gets a pass of its own."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: takes less memory and about a third more time."""
    num_epochs: PositiveInt = 1
    """Passes over the rankings. More than one overfits quickly, so the held-out figures are logged
    after each."""
    max_prompt_tokens: PositiveInt = 1024
    """Most tokens of a prompt. Longer prompts lose their oldest turns. A ranking whose last turn
    alone is longer is dropped; the number dropped is printed."""
    max_response_tokens: PositiveInt = 1024
    """Most tokens of a response. A longer response is left out of its ranking, never cut; the
    number left out is printed."""
    max_dropped: Share = 0.05
    """Largest share (0 to 1) of the rankings that may lose their prompt or a response to these two
    limits. The run stops above it."""
    max_responses: TwoOrMore | None = None
    """Responses of a ranking to train on, drawn at random. None means all."""
    margin_per_rank: NotNegative = 0.0
    """Margin in the loss for each rank between two responses (Touvron et al. 2023, eq. 2). Scores
    that differ by the margin have the loss of equal scores without one. Soft labels have no
    margin."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Train an adapter and the new head instead of all weights."""
    checkpoint_every: PositiveInt | None = 50
    """Optimizer steps between checkpoints. An interrupted run continues from the last one when the
    same command is given again. A checkpoint takes three times the size of the trained weights.
    None means no checkpoints."""
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(learning_rate=9e-6))
    """Optimizer. By default the learning rate has no warm-up and falls by a cosine to a tenth of
    its peak."""
    gold: str | None = None
    """package.module:name of a function that makes a gold score to measure against. It is called
    with gold_path and returns a function (prompts, responses) -> scores. None means no gold
    score."""
    gold_path: str | None = None
    """Argument for the function named in gold, such as a data folder."""
    trackers: list[Tracker] = field(default_factory=list)
    """Where metrics and samples go besides metrics.jsonl and samples.jsonl: tensorboard, wandb."""
    seed: int = 0
    """Seed of the new head, of the order of rankings, of the split and of all random draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rankings:
            raise ValueError("rankings is empty; give at least one file, folder or hub id")
        if (self.held_out is None) == (not self.held_out_rankings):
            raise ValueError(
                f"held_out is {self.held_out} and held_out_rankings is {self.held_out_rankings}; "
                "give exactly one of them, such as held_out: 0.1"
            )
        if (self.gold is None) != (self.gold_path is None):
            raise ValueError(
                f"gold is {self.gold} and gold_path is {self.gold_path}; give both or neither"
            )
        if self.max_held_out is not None and not self.held_out_rankings:
            raise ValueError(
                f"max_held_out is {self.max_held_out} but held_out_rankings is not given; to "
                "measure on fewer rankings of a split, lower held_out"
            )
