"""Settings of collecting comparisons."""

from dataclasses import dataclass, field

from rlhf.generation.settings import GenerationSettings
from rlhf.models.settings import ModelSettings
from rlhf.runs.settings import MayOverwrite


@dataclass(frozen=True, kw_only=True)
class Config(MayOverwrite):
    """Sample responses from a policy and have labelers rank them.

    The defaults are InstructGPT's: K = 4 to 9 responses a prompt at temperature 1
    (Ouyang et al. 2022, 3.5).
    """

    model: ModelSettings
    """Policy to sample from."""
    prompts: str
    """Prompt records: a .jsonl file, a folder of those, or hub:owner/name."""
    num_prompts: int | None = None
    """Read the first so many prompts. None means all."""
    labelers: str
    """Maker of the labelers, as package.module:name of a function labelers_path -> list of
    labelers, such as data.tinyworld:make_labelers. A labeler has a name and a method
    rank(prompt, responses, generator) -> ranks, one a response: 1 is best, equal ranks are ties,
    None is unranked; generator is a random.Random."""
    labelers_path: str
    """File or folder that the maker is called with."""
    overlap: float = 0.2
    """Share of the prompts that a second labeler ranks too, to measure agreement. Second rankings
    go to overlap.jsonl, so that no comparison is trained on twice."""
    num_responses_min: int = 4
    """Fewest samples of a prompt. Their number K is drawn evenly from here to the most."""
    num_responses_max: int = 9
    """Most samples of a prompt."""
    max_prompt_tokens: int = 512
    """Longer prompts lose their oldest turns; if the last turn alone is longer, the prompt goes."""
    max_dropped: float = 0.05
    """Stop if a larger share of the prompts would be dropped for their length."""
    max_new_tokens: int = 512
    """Responses without an end token are cut here."""
    temperature: float = 1.0
    """Temperature of the samples."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How samples are generated."""
    seed: int = 0
    """Root of every random choice."""
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
