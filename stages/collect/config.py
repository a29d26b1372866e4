"""Settings of the collect stage."""

from dataclasses import dataclass, field

from rlhf.generation.settings import GenerationSettings
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
    num_prompts: int | None = None
    """Number of prompts to read from the start of the records. None means all."""
    labelers: str
    """package.module:name of a function that makes the labelers, such as
    data.tinyworld:make_labelers. It is called with labelers_path and returns a list of labelers. A
    labeler has a name and a method rank(prompt, responses, generator) -> ranks, one a response. 1
    is best, equal ranks are ties, None is unranked. The generator is a random.Random."""
    labelers_path: str
    """Argument for the function named in labelers: a file or folder."""
    overlap: float = 0.2
    """Share of the prompts that a second labeler ranks too, to measure agreement. Second rankings
    go to overlap.jsonl, so that no comparison is trained on twice."""
    num_responses_min: int = 4
    """Fewest samples of a prompt. Their number K is drawn uniformly from num_responses_min to
    num_responses_max."""
    num_responses_max: int = 9
    """Most samples of a prompt."""
    max_prompt_tokens: int = 512
    """Most tokens of a prompt. Longer prompts lose their oldest turns. A prompt whose last turn
    alone is longer is dropped."""
    max_dropped: float = 0.05
    """Largest share of the prompts that may be dropped for their length. The run stops above it."""
    max_new_tokens: int = 512
    """Most tokens of a response; one that has not ended by then is cut."""
    temperature: float = 1.0
    """Temperature of the samples."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """The engine that samples."""
    seed: int = 0
    """Seed of every random choice."""
    output_dir: str
    """Folder to write."""

    def __post_init__(self) -> None:
        for name in ("max_prompt_tokens", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.num_prompts is not None and self.num_prompts < 1:
            raise ValueError(f"num_prompts is {self.num_prompts}; give 1 or more, or null for all")
        if self.num_responses_min < 2:
            raise ValueError(
                f"num_responses_min is {self.num_responses_min}; give 2 or more, a comparison "
                "needs two responses"
            )
        if self.num_responses_max < self.num_responses_min:
            raise ValueError(
                f"num_responses_max is {self.num_responses_max}, below num_responses_min "
                f"{self.num_responses_min}; give the larger number as max"
            )
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap is {self.overlap}; give a share of the prompts, 0 to 1")
        if not 0 <= self.max_dropped <= 1:
            raise ValueError(f"max_dropped is {self.max_dropped}; give a share, such as 0.05")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; give a positive number, or all samples of a "
                "prompt are the same"
            )
