"""Settings of the evaluate stage."""

import re
from dataclasses import dataclass, field
from typing import Literal

from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.ranges import NotNegativeInt, Positive, PositiveInt, Share, TwoOrMore
from rlhf.models.settings import Attention
from rlhf.runs.settings import StageSettings

RESERVED = (
    *("baseline", "best_of", "judge", "judges", "policies", "prompts", "seconds", "speed"),
    "warnings",
)
"""Keys of results.json that no policy and no report may use as a name."""
GOLD = "gold"
REWARD_MODEL = "rm"
"""Names of the judges that the settings `gold` and `reward_model` give. In results.json "rm" is
also the section about the reward model, so no policy may have that name."""
TIMED_TOO = ("evaluate", "total")
"""Keys of the seconds in results.json besides the stages' names."""
SAMPLE_KEYS = ("prompt_number", "prompt", "policy", "response", "finished", "parts")
"""Keys of a row of samples.jsonl besides the judges' names."""

_NAME = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True, kw_only=True)
class Config(StageSettings):
    """Measure policies on the same held-out prompts, with the same seed."""

    policies: dict[str, str]
    """Maps the name of each policy to its folder or hub id, in the order in which they were made.
    The names are keys of results.json. Warnings are about the policies after the baseline."""
    baseline: str | None = None
    """Name of the policy that win rates and KL compare with. None means the first one."""
    prompts: str
    """Held-out prompt records: a file, a folder or hub:owner/name."""
    num_prompts: TwoOrMore = 256
    """Most prompts to use. If there are more, the seed draws some."""
    samples_per_prompt: PositiveInt = 1
    """Responses to sample for each prompt and policy."""
    max_prompt_tokens: PositiveInt = 256
    """Most tokens of a prompt. Longer prompts lose their oldest turns. A prompt whose last turn
    alone is longer is dropped; the number dropped is printed."""
    max_dropped: Share = 0.05
    """Largest share of the prompts that may be dropped for their length. The run stops above it."""
    max_new_tokens: PositiveInt = 128
    """Most tokens of a response; one that has not ended by then is cut."""
    temperature: Positive = 1.0
    """Sampling temperature. KL compares the policies at this temperature."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """The engine that samples."""
    micro_batch_tokens: PositiveInt = 1024
    """Most tokens in one pass over responses or texts. It changes no result. The cost of attention
    grows with their square, so a CPU reads short responses fastest at some hundred tokens."""
    reward_model: str | None = None
    """Folder that the rm stage wrote. None means that no reward model scores."""
    allow_chance_reward: bool = False
    """Use a reward model even if the interval of its held-out accuracy includes 0.5."""
    gold: str | None = None
    """package.module:name of a function that makes a true score. It returns a function (prompts,
    responses) -> one number a response, which decides the win rates. The score may also have parts
    (see stages/evaluate/parts.py). None means no true score; then the reward model decides."""
    gold_path: str | None = None
    """Argument for the function named in gold. None means that it takes none."""
    right_part: str | None = "correct"
    """Part of gold that says whether a response is right. It is also measured on greedy responses.
    It is not measured if this is None or gold has no such part."""
    pair_samples_per_prompt: NotNegativeInt = 6
    """Responses to sample for each prompt from the baseline, to test the reward model on pairs that
    differ in one part of gold only. 0 means no such test."""
    best_of: TwoOrMore | None = None
    """Also measure best-of-n of the baseline for this n: the response that best_of_judge scores
    highest among n. It stands next to the policies as best_of_N. None means no such entry."""
    best_of_samples: TwoOrMore | None = None
    """Responses to sample for each prompt from the baseline for best_of. With more than n, the mean
    over all subsets of n is taken, which varies less. None means best_of. The test on pairs uses
    the same responses, and raises their number to pair_samples_per_prompt if that is larger."""
    best_of_judge: str = REWARD_MODEL
    """Name of the judge that chooses for best_of: rm, gold, or one of judges."""
    judges: dict[str, str] = field(default_factory=dict)
    """Maps names to independent judges. A judge is the folder of another reward model, or the
    package.module:name of a function that PPO could take as a reward. A warning says when the
    reward model's score rises and a judge's score does not. Another says when a policy gains by one
    judge and loses by another."""
    held_out_text: str | None = None
    """Text records to measure the language modelling loss on. None means that it is not
    measured."""
    num_texts: PositiveInt = 200
    """Most documents of held_out_text to use, from the start of the records."""
    max_text_tokens: TwoOrMore = 256
    """Most tokens to use of each document, from its start."""
    fact_probe: str | None = None
    """Prompt records with fact probes (see rlhf/measuring/fact_recall.py). None means that recall
    is not measured."""
    reports: dict[str, str] = field(default_factory=dict)
    """Maps names to folders of runs. The results.json of each is copied under its name."""
    stages: dict[str, str] = field(default_factory=dict)
    """Maps names to folders of runs whose seconds are shown. Missing folders are named and left
    out."""
    num_shown: NotNegativeInt = 12
    """Prompts to show in samples.md after its table."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the policies' weights."""
    attention: Attention = "sdpa"
    """Attention implementation of the policies."""
    trust_remote_code: bool = False
    """Run Python code that comes with the models. Only for sources that you trust."""
    output_dir: str
    """Folder of results.json, samples.md, samples.jsonl and report.html."""
    seed: int = 0
    """Seed of the choice of prompts, of sampling (the same for every policy) and of intervals."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.policies:
            raise ValueError("policies is empty; give at least one, such as {sft: runs/tiny/sft}")
        if self.baseline is not None and self.baseline not in self.policies:
            names = ", ".join(self.policies)
            raise ValueError(f"baseline is {self.baseline!r}; give one of the policies {names}")
        _check_names(self.policies, self.reports)
        _check_judges(self.judges)
        for name in TIMED_TOO:
            if name in self.stages:
                raise ValueError(
                    f"stages has the name {name!r}, under which results.json has other seconds; "
                    "give another"
                )
        if self.pair_samples_per_prompt == 1:
            raise ValueError(
                "pair_samples_per_prompt is 1, and a pair needs two; give 2 or more, or 0 for none"
            )
        if self.gold_path is not None and self.gold is None:
            raise ValueError(f"gold_path is {self.gold_path} but gold is null; name the maker too")
        self._check_best_of()

    def _check_best_of(self) -> None:
        if self.best_of is None:
            if self.best_of_samples is not None:
                raise ValueError(
                    f"best_of_samples is {self.best_of_samples} but best_of is null; give best_of "
                    "too, or leave both out"
                )
            return
        if self.best_of_samples is not None and self.best_of_samples < self.best_of:
            raise ValueError(
                f"best_of_samples is {self.best_of_samples}, fewer than best_of {self.best_of}; "
                "give at least as many"
            )
        given = {GOLD: self.gold, REWARD_MODEL: self.reward_model, **self.judges}
        judges = [name for name, one in given.items() if one is not None]
        if self.best_of_judge not in judges:
            raise ValueError(
                f"best_of needs the judge best_of_judge {self.best_of_judge!r}, which is not "
                f"given; the judges are: {', '.join(judges) or 'none'}"
            )
        for section in (self.policies, self.reports):
            if self.best_of_name in section:
                raise ValueError(
                    f"best_of {self.best_of} is called {self.best_of_name} in results.json, and a "
                    "policy or report has that name too; give it another"
                )

    @property
    def best_of_name(self) -> str:
        """Key of results.json that holds the figures of best-of-n."""
        return f"best_of_{self.best_of}"

    @property
    def baseline_name(self) -> str:
        return self.baseline or next(iter(self.policies))

    @property
    def policies_after_baseline(self) -> list[str]:
        names = list(self.policies)
        return names[names.index(self.baseline_name) + 1 :]


def _check_names(policies: dict[str, str], reports: dict[str, str]) -> None:
    """Check names that become keys of results.json."""
    for section, names in (("policies", policies), ("reports", reports)):
        for name in names:
            if name in RESERVED or _NAME.fullmatch(name) is None:
                raise ValueError(
                    f"{section} has the name {name!r}; use letters, digits, _ and -, and none of "
                    f"{', '.join(RESERVED)}"
                )
    if REWARD_MODEL in policies:
        raise ValueError(
            f"policies has the name {REWARD_MODEL!r}, under which results.json has the reward "
            "model's figures; give another"
        )
    both = sorted(set(policies) & set(reports))
    if both:
        raise ValueError(
            f"policies and reports both have the name {both[0]!r}; rename one, or one would "
            "overwrite the other in results.json"
        )


def _check_judges(judges: dict[str, str]) -> None:
    """Check names that become keys of samples.jsonl and parts of keys of results.json."""
    taken = (GOLD, REWARD_MODEL, *SAMPLE_KEYS)
    for name in judges:
        if name in taken or _NAME.fullmatch(name) is None:
            raise ValueError(
                f"judges has the name {name!r}; use letters, digits, _ and -, and none of "
                f"{', '.join(taken)}"
            )
