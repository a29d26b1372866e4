"""Settings of the evaluate stage."""

import re
from dataclasses import dataclass, field
from typing import Literal

from rlhf.generation.settings import GenerationSettings
from rlhf.models.settings import Attention
from rlhf.runs.settings import MayOverwrite

RESERVED = ("baseline", "judge", "judges", "policies", "prompts", "seconds", "speed", "warnings")
"""Keys of results.json that no policy and no report can take."""
GOLD = "gold"
REWARD_MODEL = "rm"
"""Names of the judges that `gold` and `reward_model` give. In results.json the second is also the
section about the reward model, so no policy can have that name."""
TIMED_TOO = ("evaluate", "total")
"""Keys that the seconds of results.json have beside the stages' names."""
SAMPLE_KEYS = ("prompt_number", "prompt", "policy", "response", "finished", "parts")
"""Keys of a row of samples.jsonl beside the judges' names."""

_NAME = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True, kw_only=True)
class Config(MayOverwrite):
    """Measure policies on the same held-out prompts, with the same seed."""

    policies: dict[str, str]
    """Name -> folder or hub id of each policy, in the order in which they were made; the names are
    keys of results.json. Warnings are about those after the baseline."""
    baseline: str | None = None
    """Name of the policy that win rates and KL are against. None means the first one."""
    prompts: str
    """Held-out prompt records: a file, a folder or hub:owner/name."""
    num_prompts: int = 256
    """Prompts used at most; drawn by the seed when there are more."""
    samples_per_prompt: int = 1
    """Responses sampled for each prompt and policy."""
    max_prompt_tokens: int = 256
    """Longer prompts lose their oldest turns; those whose last turn alone is longer are dropped,
    counted and reported."""
    max_new_tokens: int = 128
    """A response without its end token is cut here."""
    temperature: float = 1.0
    """Sampling temperature; KL is between the policies at this temperature."""
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    """How responses are sampled."""
    micro_batch_tokens: int = 1024
    """Most tokens of one pass over whole responses or texts; changes no result. Attention costs its
    square, so short responses are read fastest at some hundred tokens on a CPU."""
    reward_model: str | None = None
    """Folder of the rm stage. None means that no reward model scores."""
    allow_chance_reward: bool = False
    """Use a reward model although the interval of its held-out accuracy reaches down to 0.5."""
    gold: str | None = None
    """A true score, as package.module:name of a maker; what it returns is called with (prompts,
    responses) and gives one number a response. It decides the win rates. It may give its parts too
    (see stages/evaluate/parts.py). None means that there is none, and that the reward model
    decides."""
    gold_path: str | None = None
    """Path that the maker is called with. None means that it is called without."""
    right_part: str | None = "correct"
    """Part of gold that says whether a response is right; it is measured on greedy responses too.
    None, or a gold without this part, means that nothing says it."""
    pair_samples_per_prompt: int = 6
    """Responses sampled for each prompt from the baseline, whose pairs that differ in one part of
    gold alone tell how well the reward model hears that part. 0 means that it is not measured."""
    judges: dict[str, str] = field(default_factory=dict)
    """Name -> independent judges: the folder of another reward model, or package.module:name of a
    function as PPO takes it for a reward. A warning says when the reward model's score rises and
    theirs does not, and when a policy gains by one and loses by another."""
    held_out_text: str | None = None
    """Text records on which the loss as a language model is measured. None means that it is not."""
    num_texts: int = 200
    """Documents of held_out_text used, from the first."""
    max_text_tokens: int = 256
    """Tokens of each document that are used, from the first."""
    fact_probe: str | None = None
    """Prompt records with fact probes (see rlhf/measuring/fact_recall.py). None means no recall is
    measured."""
    reports: dict[str, str] = field(default_factory=dict)
    """Name -> folder of a run whose results.json is copied under that name."""
    stages: dict[str, str] = field(default_factory=dict)
    """Name -> folder of a run whose seconds and learning curves are shown; absent ones are named
    and left out."""
    num_shown: int = 12
    """Prompts in samples.md."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the policies' weights."""
    attention: Attention = "sdpa"
    """Attention implementation of the policies."""
    trust_remote_code: bool = False
    """Run Python code that comes with the models. Only for sources that you trust."""
    output_dir: str
    """Folder of results.json, samples.md, samples.jsonl and curves.png."""
    seed: int = 0
    """Seed of the choice of prompts, of sampling (the same for every policy) and of intervals."""

    def __post_init__(self) -> None:
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
        least = {
            "num_prompts": 2,
            "max_text_tokens": 2,
            "num_shown": 0,
            "pair_samples_per_prompt": 0,
        }
        counts = ("samples_per_prompt", "max_prompt_tokens", "max_new_tokens", "num_texts")
        least |= dict.fromkeys((*counts, "micro_batch_tokens"), 1)
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; give {lowest} or more")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature is {self.temperature}; give a number above 0, since KL and win rates "
                "are those of sampled responses"
            )

    @property
    def baseline_name(self) -> str:
        return self.baseline or next(iter(self.policies))

    @property
    def policies_after_baseline(self) -> list[str]:
        names = list(self.policies)
        return names[names.index(self.baseline_name) + 1 :]


def _check_names(policies: dict[str, str], reports: dict[str, str]) -> None:
    """Every name becomes a key of results.json, next to the others."""
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
    """Every name becomes a key of samples.jsonl, and part of keys of results.json."""
    taken = (GOLD, REWARD_MODEL, *SAMPLE_KEYS)
    for name in judges:
        if name in taken or _NAME.fullmatch(name) is None:
            raise ValueError(
                f"judges has the name {name!r}; use letters, digits, _ and -, and none of "
                f"{', '.join(taken)}"
            )
