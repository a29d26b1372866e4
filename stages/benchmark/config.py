"""Settings of the benchmark stage."""

from dataclasses import dataclass, field
from typing import Literal

from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.ranges import Positive, PositiveInt, Ranged, TwoOrMore
from rlhf.models.settings import Attention
from rlhf.runs.settings import StageSettings

Rendering = Literal["plain", "chat"]


@dataclass(frozen=True, kw_only=True)
class TaskSettings(Ranged):
    """Renderings, examples and samples of one task, the same for every policy."""

    shots: list[int] = field(default_factory=lambda: [0])
    """Numbers of solved examples before each question, such as [0, 1, 5]. Several numbers give a
    learning curve, measured on the same questions."""
    renderings: list[Rendering] = field(default_factory=lambda: ["plain", "chat"])
    """plain: the question as text, as a base model reads it. chat: through the policy's chat
    template, with the examples as earlier turns."""
    draws: PositiveInt = 1
    """How often to draw the examples. A figure is the mean over the draws."""
    samples: PositiveInt = 1
    """Answers to sample for each question of a generation task. 1 takes the greedy answer. More
    give self-consistency: how often the majority of k answers is right."""
    temperature: Positive = 0.7
    """Sampling temperature, used if samples is above 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shots or min(self.shots) < 0 or len({*self.shots}) < len(self.shots):
            raise ValueError(f"shots is {self.shots}; give different numbers of 0 or more, as [0]")
        if not self.renderings:
            raise ValueError("renderings is empty; give plain, chat or both")
        if self.draws > 1 and self.samples > 1:
            raise ValueError(
                f"draws is {self.draws} and samples is {self.samples}; a vote is among answers to "
                "one prompt, so give 1 for one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Config(StageSettings):
    """Measure policies on benchmark tasks, with the same questions and examples for all."""

    policies: dict[str, str]
    """Maps the name of each policy to its folder or hub id, in the order they were made."""
    baselines: list[str] | None = None
    """Names of the policies that all others are compared with, question by question, such as
    [base, sft]. None means the first policy."""
    tasks: dict[str, TaskSettings]
    """Maps the name of each task to its settings. NAME is the file NAME.yaml in task_dir, or else a
    task that lm-evaluation-harness brings, which reads a data set of the hub."""
    task_dir: str = "configs/benchmark/tasks"
    """Folder of task files in the format of lm-evaluation-harness. A task file may name functions
    to run, so use only files that you trust."""
    data_dir: str | None = None
    """Folder of the data files that task files name. None means the folder that each task file
    names itself."""
    plain_only: list[str] = field(default_factory=list)
    """Names of policies that get no chat rendering, such as a base model without a template."""
    limit: TwoOrMore | None = None
    """Most questions of each task, from the start of its test split. None means all."""
    num_shot_questions: PositiveInt = 200
    """Questions to hold out as examples where a task has shots, but no other split to draw them
    from. A hash chooses them, so they are the same in every run."""
    engine: Literal["packed", "hflm"] = "packed"
    """packed: our passes, which read a context once for all its choices. hflm: the harness's own
    class HFLM on the same weights, to compare with."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """The engine that samples answers."""
    micro_batch_tokens: PositiveInt = 1024
    """Most tokens in one pass over contexts and choices. It changes no result."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the policies' weights."""
    attention: Attention = "sdpa"
    """Attention implementation of the policies."""
    trust_remote_code: bool = False
    """Run Python code that comes with the models. Only for sources that you trust."""
    output_dir: str
    """Folder of results.json, benchmark.md and samples.jsonl."""
    seed: int = 0
    """Seed of the examples, of sampling (the same for every policy) and of intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.policies:
            raise ValueError("policies is empty; give at least one, such as {sft: runs/tiny/sft}")
        if not self.tasks:
            raise ValueError("tasks is empty; give at least one, such as {piqa: {shots: [0]}}")
        for key in ("baselines", "plain_only"):
            for name in getattr(self, key) or ():
                if name not in self.policies:
                    known = ", ".join(self.policies)
                    raise ValueError(f"{key} has {name!r}; give some of the policies {known}")
        if self.engine == "hflm" and self.generation != GenerationSettings(
            batch_size=self.generation.batch_size
        ):
            raise ValueError(
                "engine is hflm, which samples by itself; of generation, give only batch_size"
            )

    @property
    def baseline_names(self) -> list[str]:
        return list(self.policies)[:1] if self.baselines is None else self.baselines
