"""Defines settings of the reward."""

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from rlhf.inputs.ranges import NotNegative, NotNegativeInt, Positive, Ranged, TwoOrMore
from rlhf.models.settings import Attention

MissingEnd = Literal["replace", "subtract", "none"]
Combination = Literal["mean", "worst", "mean_minus_spread"]

_PART_NAME = re.compile(r"[A-Za-z][\w-]*")


@dataclass(frozen=True, kw_only=True)
class PartSettings:
    """One part of a reward. Give exactly one of model and function."""

    model: str | None = None
    """Folder that the rm stage wrote. None means that function gives this part."""
    function: str | None = None
    """Your own reward, as package.module:name. None means that model gives this part."""
    per_token: bool = False
    """Whether the function returns a list with one number per token for each response. It is then
    called with the tokens' texts as its fourth argument."""
    weight: float = 1.0
    """Weight of the part's scores in the sum. Below 0 the part counts against the response."""
    only_with: str | None = None
    """Judge only prompts whose meta has a true value under this key. The part adds nothing to the
    score of other prompts. None means that only_with leaves no prompt out."""
    only_without: str | None = None
    """Judge only prompts whose meta has no true value under this key. None means that only_without
    leaves no prompt out."""
    debias_length: bool = False
    """Take out of this part what the length of a response explains, as reward.debias_length does
    for a reward without parts. It needs reward.normalize_on."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.function is None):
            raise ValueError(
                f"model is {self.model!r} and function is {self.function!r}; give exactly one"
            )
        _check_per_token(self.per_token, self.function)
        if not math.isfinite(self.weight) or self.weight == 0:
            raise ValueError(f"weight is {self.weight}; give a number that is not 0")


@dataclass(frozen=True, kw_only=True)
class EnsembleSettings(Ranged):
    """Combines several reward models into one (Coste et al. 2023)."""

    models: tuple[str, ...] = ()
    """Folders that the rm stage wrote, preferably with different seeds. Empty means no ensemble."""
    combine: Combination = "mean"
    """How the members' scores become one: their mean, the worst (smallest), or the mean minus
    spread_coef times their variance."""
    spread_coef: NotNegative = 1.0
    """Weight of the variance over the members in mean_minus_spread."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.models) == 1:
            raise ValueError(
                f"models has one member, {self.models[0]}; give two or more, or set it as "
                "reward.model"
            )


@dataclass(frozen=True, kw_only=True)
class RewardSettings(Ranged):
    """Where the reward comes from. Give exactly one of model, function, parts and ensemble.models.

    Five settings then change every score, in this order: debias_length, normalize_on, clip,
    length_penalty, missing_end.
    """

    model: str | None = None
    """Folder that the rm stage wrote. None means that the reward comes from elsewhere."""
    function: str | None = None
    """Your own reward, as package.module:name of a function (prompts, responses, metas) -> list of
    numbers, one per response. None means that the reward comes from elsewhere."""
    per_token: bool = False
    """Whether the function returns a list with one number per token for each response. It is then
    called with the tokens' texts as its fourth argument."""
    parts: dict[str, PartSettings] = field(default_factory=dict)
    """Maps a name to a part, a section with the keys model, function, per_token and weight. The
    score is the sum of weight * part. Empty means that the reward comes from elsewhere."""
    ensemble: EnsembleSettings = field(default_factory=EnsembleSettings)
    """Several reward models combined into one."""
    dtype: Literal["measured", "float32", "bfloat16"] = "measured"
    """Type of the reward models' weights. measured is the type in which each one was measured, as
    its reward.json says."""
    attention: Attention = "sdpa"
    """Attention implementation of the reward models. Without support for a packing mask, each
    response needs a row of its own."""
    trust_remote_code: bool = False
    """Run Python code that comes with the reward models. Set it only for sources that you trust."""
    allow_chance_reward: bool = False
    """Use a reward model even if the interval of its held-out accuracy reaches down to 0.5."""
    normalize_on: TwoOrMore | None = None
    """Number of samples of the reference policy, drawn before the first update, whose scores get
    mean 0 and standard deviation 1 (Ziegler et al. 2019). With parts, each part is normalised by
    itself, on the samples that it judges, before it is weighted. None leaves scores unchanged."""
    debias_length: bool = False
    """Take out of the scores what the length of a response explains (length bias, Singhal et al.
    2023). This is a straight line, fitted to the samples of normalize_on, of which each prompt then
    gets two. Only differences between answers to one prompt count. With parts, set it on each part
    that prefers a length as such."""
    clip: Positive | None = None
    """Limit of the scores, which are clipped to -clip..clip. None means no clip."""
    length_penalty: NotNegative = 0.0
    """Subtracted from the score for every response token beyond length_allowance. 0 means no
    penalty."""
    length_allowance: NotNegativeInt = 0
    """Response tokens, including the end token, that cost no length_penalty."""
    missing_end: MissingEnd = "subtract"
    """How to change the score of a response without its end token: replace puts missing_end_value
    in its place, subtract subtracts missing_end_value, none leaves it unchanged."""
    missing_end_value: float = 1.0
    """Replaces the score (such as -1) or is subtracted from it (such as 1)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source()
        _check_per_token(self.per_token, self.function)
        if self.debias_length and self.parts:
            raise ValueError(
                "debias_length is True and the reward has parts, each with a length of its own to "
                f"like; set debias_length on a part, such as {next(iter(self.parts))}"
            )
        if self.takes_length_out and (self.normalize_on is None or self.normalize_on < 4):
            raise ValueError(
                f"debias_length is True and normalize_on is {self.normalize_on}; the line is "
                "fitted to the samples of normalize_on, so give 4 or more, better 256"
            )
        if not math.isfinite(self.missing_end_value):
            raise ValueError(f"missing_end_value is {self.missing_end_value}; give a number")
        if self.missing_end == "subtract" and self.missing_end_value < 0:
            raise ValueError(
                f"missing_end is subtract and missing_end_value is {self.missing_end_value}, which "
                "would reward responses without an end; give a positive value, or replace"
            )

    def _check_source(self) -> None:
        given = {
            "model": self.model,
            "function": self.function,
            "parts": list(self.parts) or None,
            "ensemble.models": list(self.ensemble.models) or None,
        }
        if sum(value is not None for value in given.values()) != 1:
            raise ValueError(
                f"{', '.join(f'{name} is {value!r}' for name, value in given.items())}; "
                "give exactly one"
            )
        for name in self.parts:
            if _PART_NAME.fullmatch(name) is None:
                raise ValueError(
                    f"parts has the name {name!r}, which becomes a metric's; use letters, digits, "
                    "_ and -"
                )

    @property
    def takes_length_out(self) -> bool:
        """Whether any score loses what the length explains."""
        return self.debias_length or any(part.debias_length for part in self.parts.values())

    @property
    def model_paths(self) -> dict[str, str]:
        """Folders of all reward models, by the settings that name them."""
        paths = {"model": self.model}
        paths |= {f"parts.{name}": part.model for name, part in self.parts.items()}
        paths |= {f"ensemble.{i}": path for i, path in enumerate(self.ensemble.models)}
        return {name: path for name, path in paths.items() if path is not None}

    @property
    def value_start(self) -> tuple[str, float] | None:
        """The first reward model and its weight. A value model may start from it."""
        starts = [
            (self.model, 1.0),
            *((part.model, part.weight) for part in self.parts.values()),
            *((path, 1.0) for path in self.ensemble.models),
        ]
        return next(((path, weight) for path, weight in starts if path is not None), None)


def _check_per_token(per_token: bool, function: str | None) -> None:
    if per_token and function is None:
        raise ValueError(
            f"per_token is {per_token} and function is {function!r}; only a function gives numbers "
            "a token"
        )
