"""Settings of the collect stage."""

from dataclasses import dataclass, field

from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.ranges import Positive, PositiveInt, Share, TwoOrMore
from rlhf.models.settings import ModelSettings
from rlhf.runs.settings import StageSettings


@dataclass(frozen=True, kw_only=True)
class Config(StageSettings):
    """Sample responses from a policy and have labelers rank them.

    The defaults are InstructGPT's: K = 4 to 9 responses a prompt at temperature 1
    (Ouyang et al. 2022, 3.5).
    """

    model: ModelSettings
    """Policy to sample from."""
    prompts: str
    """Prompt records: a .jsonl file, a folder of those, or hub:owner/name."""
    num_prompts: PositiveInt | None = None
    """Number of prompts to read from the start of the records. None means all."""
    labelers: str
    """package.module:name of a function that makes the labelers, such as
    data.tinyworld:make_labelers. It is called with labelers_path and returns a list of labelers. A
    labeler has a name and a method rank(prompt, responses, generator) -> ranks, one a response. 1
    is best, equal ranks are ties, None is unranked. The generator is a random.Random."""
    labelers_path: str
    """Argument for the function named in labelers: a file or folder."""
    overlap: Share = 0.2
    """Share of the prompts that a second labeler ranks too, to measure agreement. Second rankings
    go to overlap.jsonl, so that no comparison is trained on twice."""
    num_responses_min: TwoOrMore = 4
    """Fewest samples of a prompt. Their number K is drawn uniformly from num_responses_min to
    num_responses_max."""
    num_responses_max: int = 9
    """Most samples of a prompt."""
    max_prompt_tokens: PositiveInt = 512
    """Most tokens of a prompt. Longer prompts lose their oldest turns. A prompt whose last turn
    alone is longer is dropped."""
    max_dropped: Share = 0.05
    """Largest share of the prompts that may be dropped for their length. The run stops above it."""
    max_new_tokens: PositiveInt = 512
    """Most tokens of a response; one that has not ended by then is cut."""
    temperature: Positive = 1.0
    """Temperature of the samples."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """The engine that samples."""
    seed: int = 0
    """Seed of every random choice."""
    output_dir: str
    """Folder to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_responses_max < self.num_responses_min:
            raise ValueError(
                f"num_responses_max is {self.num_responses_max}, below num_responses_min "
                f"{self.num_responses_min}; give the larger number as max"
            )
