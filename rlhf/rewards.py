"""Where a score comes from: a trained reward model, or a function of the user's.

Both answer `score(...)` with one number a response, before the KL penalty. What a response without
an end costs, and the clip, are pure functions of scores, applied by the caller in this order:

    scores = clip_scores(reward.score(...), settings.clip)
    scores = adjust_missing_end(scores, finished_mask, ...)

The clip comes first, or it could swallow the penalty.
"""

import hashlib
import importlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from rlhf.chat import Chat
from rlhf.config import ModelSettings
from rlhf.inference import compute_scores
from rlhf.models import ScalarModel, load_chat, load_scalar, packer_for
from rlhf.packing import Packer, PromptTree
from rlhf.records import Prompt, PromptLike

REWARD_FILE = "reward.json"
"""Beside the weights of a reward model: what the weights cannot hold."""

NUM_GOLDEN = 8
GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}
"""Largest difference of a golden score, relative to max(1, |score|), by type of the weights."""

_RENDERING_PROBE = "A probe: 12,345 times \u00e9\u4e2d\U0001f600\n\n\tend."

MissingEnd = Literal["replace", "subtract", "none"]
RewardFunction = Callable[[list[PromptLike], list[str], list[dict[str, Any]]], list[float]]


@dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """Where the reward comes from: exactly one of model and function."""

    model: str | None = None
    """Folder that the rm stage wrote. None means that function gives the reward."""
    function: str | None = None
    """Own reward, as package.module:name of a function (prompts, responses, metas) -> list of
    numbers, one a response. None means that model gives the reward."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the reward model's weights. float32 is what it was measured in."""
    trust_remote_code: bool = False
    """Run Python code that comes with the reward model. Only for sources that you trust."""
    allow_chance_reward: bool = False
    """Use a reward model although the interval of its held-out accuracy reaches down to 0.5."""
    missing_end: MissingEnd = "subtract"
    """A response without its end token: replace its score by missing_end_value, subtract
    missing_end_value from it, or none, leave it."""
    missing_end_value: float = 1.0
    """What replaces the score (such as -1) or is subtracted from it (such as 1), in its units."""
    clip: float | None = None
    """Scores are cut to -clip..clip before missing ends are charged. None means no clip."""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.function is None):
            raise ValueError(
                f"model is {self.model!r} and function is {self.function!r}; give exactly one"
            )
        if not math.isfinite(self.missing_end_value):
            raise ValueError(f"missing_end_value is {self.missing_end_value}; give a number")
        if self.missing_end == "subtract" and self.missing_end_value < 0:
            raise ValueError(
                f"missing_end is subtract and missing_end_value is {self.missing_end_value}, which "
                "would reward responses without an end; give a positive value, or replace"
            )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}; give a positive number, or null for no clip")


class Reward(Protocol):
    """Anything that scores responses."""

    def score(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        responses: Sequence[str],
    ) -> Tensor:
        """Scores (batch,), fp32, on the CPU. All four arguments have one entry a response."""
        ...


@dataclass(frozen=True, kw_only=True)
class GoldenRow:
    """A prompt, a response and the score that the reward model gave when it was saved."""

    prompt: PromptLike
    response: str
    score: float


@dataclass(frozen=True, kw_only=True)
class RewardCard:
    """What reward.json holds.

    score = scale * (raw score of the classifier - bias)
    """

    bias: float
    """Mean raw score of the demonstrations, so that these score 0 (Ouyang et al. 2022, 3.5)."""
    scale: float
    """1 unless a user sets it: InstructGPT shifts its rewards and does not scale them."""
    pair_accuracy: float
    """Share of held-out pairs that the model orders as the labelers do."""
    interval: tuple[float, float]
    """95 % interval of pair_accuracy."""
    golden: tuple[GoldenRow, ...]
    template_hash: str
    """SHA-256 of the chat template."""
    rendering_hash: str
    """`rendering_hash` of the chat that the model was trained with."""

    def save(self, folder: str | Path) -> None:
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2, allow_nan=False)
        path = Path(folder) / REWARD_FILE
        beside = path.with_name(path.name + ".part")
        beside.write_text(text + "\n", encoding="utf-8")
        beside.replace(path)

    @classmethod
    def load(cls, folder: str | Path) -> "RewardCard":
        """Raises ValueError where the folder holds no readable reward.json."""
        path = Path(folder) / REWARD_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {REWARD_FILE}, so the zero of its scores is unknown; give the "
                "folder that the rm stage wrote"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            golden = tuple(GoldenRow(**row) for row in values.pop("golden"))
            low, high = values.pop("interval")
            if not golden:
                raise ValueError("no golden rows")
            return cls(golden=golden, interval=(low, high), **values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{path} is no reward card of the rm stage ({error}); run that stage again"
            ) from error


class RewardModel:
    """A trained reward model with its bias and scale; scores in evaluation mode, no gradient."""

    def __init__(self, model: ScalarModel, card: RewardCard, chat: Chat, packer: Packer) -> None:
        self.model = model
        self.card = card
        self.chat = chat
        self.packer = packer

    def score(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        responses: Sequence[str],
    ) -> Tensor:
        """As Reward.score; only the ids are looked at."""
        return self.scores(prompt_ids, response_ids)

    def scores(
        self, prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]
    ) -> Tensor:
        """Scores (batch,), fp32, of responses; neighbours with one prompt share its pass.

        Raises:
            ValueError: a response has no token at all.
        """
        return compute_scores(self.model, trees_of(prompt_ids, response_ids), self.packer).float()

    def recheck(self) -> None:
        """Scores the golden rows again.

        Raises:
            ValueError: a score is not what it was when the model was saved.
        """
        golden = self.card.golden
        found = self.scores(
            [self.chat.prompt_ids(row.prompt) for row in golden],
            [self.chat.response_ids(row.response) for row in golden],
        ).tolist()
        dtype = str(self.model.classifier.dtype).removeprefix("torch.")
        tolerance = GOLDEN_TOLERANCE[dtype]
        for i, (row, score) in enumerate(zip(golden, found, strict=True)):
            if not abs(score - row.score) <= tolerance * max(1.0, abs(row.score)):
                raise ValueError(
                    f"the reward model scores golden row {i} at {score:.4f}, and {row.score:.4f} "
                    f"when it was saved ({dtype}, tolerance {tolerance}): its weights, "
                    f"tokenizer or chat template changed since; copy the whole folder again or "
                    "train it again"
                )


class FunctionReward:
    """A user's function as a reward; whatever it gets wrong is told with its row."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function = function
        self.name = name

    def score(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        responses: Sequence[str],
    ) -> Tensor:
        """As Reward.score; only prompts and responses are looked at.

        Raises:
            ValueError: the function failed, gave another number of scores, or one not finite.
        """
        values = self._call(prompts, responses)
        try:
            values = list(values)
        except TypeError:
            raise ValueError(
                f"reward function {self.name} returned {type(values).__name__}; "
                "it must return a list with one number a response"
            ) from None
        if len(values) != len(responses):
            raise ValueError(
                f"reward function {self.name} returned {len(values)} scores for {len(responses)} "
                f"responses; the first row without its own is {min(len(values), len(responses))}"
            )
        return torch.tensor([self._number(i, value) for i, value in enumerate(values)])

    def _call(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        try:
            return self._call_plainly(prompts, responses)
        except Exception as error:
            place = self._failing_row(prompts, responses)
            raise ValueError(
                f"reward function {self.name} failed on {place}: {type(error).__name__}: {error}"
            ) from error

    def _call_plainly(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> Any:
        return self.function(
            [prompt.prompt for prompt in prompts],
            list(responses),
            [dict(prompt.meta) for prompt in prompts],
        )

    def _failing_row(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> str:
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            try:
                self._call_plainly([prompt], [response])
            except Exception:
                return f"row {i} (response {response[:60]!r})"
        return f"a batch of {len(responses)} rows, on none of them alone"

    def _number(self, i: int, value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(
                f"reward function {self.name} gave {value!r} for row {i}; "
                "it must give a finite number"
            )
        return number


def load_reward(
    settings: RewardSettings, chat: Chat, device: torch.device | str, micro_batch_tokens: int
) -> Reward:
    """The reward of these settings, checked and ready to score.

    Args:
        chat: The policy's rendering; a reward model must have the same.
        micro_batch_tokens: Most tokens of one pass of a reward model.

    Raises:
        ValueError: What load_reward_model and load_reward_function refuse.
    """
    if settings.function is not None:
        return FunctionReward(load_reward_function(settings.function), settings.function)
    assert settings.model is not None
    model = ModelSettings(
        path=settings.model, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
    )
    return load_reward_model(
        model,
        micro_batch_tokens=micro_batch_tokens,
        device=device,
        policy_chat=chat,
        allow_chance_reward=settings.allow_chance_reward,
    )


def load_reward_model(
    settings: ModelSettings,
    *,
    micro_batch_tokens: int,
    device: torch.device | str = "cpu",
    policy_chat: Chat | None = None,
    allow_chance_reward: bool = False,
) -> RewardModel:
    """A folder of the rm stage, its golden rows scored again.

    Args:
        policy_chat: Rendering of the policy that is to be scored; None: not compared.
        allow_chance_reward: Load it even if it may be no better than a coin.

    Raises:
        ValueError: no head, no reward.json, another rendering than the policy's, an accuracy that
            may be chance, or golden scores that changed.
    """
    model, card = _load_with_card(settings)
    chat = load_chat(settings)
    if policy_chat is not None:
        check_rendering(policy_chat, chat, settings.path)
    _refuse_chance(settings.path, card, allow_chance_reward)
    model.to(device).requires_grad_(False)
    reward = RewardModel(model, card, chat, packer_for(model.classifier, micro_batch_tokens))
    reward.recheck()
    return reward


def load_value_model(settings: ModelSettings) -> ScalarModel:
    """The value model that PPO starts from: the reward model, in units of its scores.

    Raises:
        ValueError: the folder has no head or no reward.json.
    """
    return _load_with_card(settings)[0]


def load_reward_function(name: str) -> RewardFunction:
    """The function called package.module:name; see load_function for the errors."""
    return load_function(name)


def load_function(name: str) -> Callable[..., Any]:
    """What package.module:name names: a reward function, a labeler's or a gold score's maker.

    Raises:
        ValueError: the spelling, the module, or the name in it is wrong.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{name!r} names no function; write package.module:name")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module_name} for {name!r} ({error}); start the program where the "
            "module lies, or install it"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"{module_name} has no function {attribute!r}; it has {', '.join(names) or 'none'}"
        )
    return function


def adjust_missing_end(
    scores: Tensor, finished_mask: Tensor, mode: MissingEnd, value: float
) -> Tensor:
    """What a response costs that did not end by itself; without a cost policies run on.

    "replace" puts `value` in place of the score: Huang et al. 2024 (the N+ details) use -1.
    "subtract" takes `value` off the score: TRL's missing_eos_penalty, usually 1, which keeps the
    order among unfinished responses. "none" changes nothing.

    Args:
        scores: (batch,)
        finished_mask: (batch,) True where the response ends with its end token.
    """
    if mode == "none":
        return scores
    charged = torch.full_like(scores, value) if mode == "replace" else scores - value
    return torch.where(finished_mask, scores, charged)


def clip_scores(scores: Tensor, limit: float | None) -> Tensor:
    """Scores cut to -limit..limit; None: as they are."""
    return scores if limit is None else scores.clamp(-limit, limit)


def trees_of(
    prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]
) -> list[PromptTree]:
    """One tree for each stretch of neighbours with the same prompt; keeps the responses' order."""
    rows = zip(prompt_ids, response_ids, strict=True)
    pairs = [(tuple(prompt), tuple(response)) for prompt, response in rows]
    return [
        PromptTree(prompt, tuple(response for _, response in group))
        for prompt, group in groupby(pairs, key=lambda pair: pair[0])
    ]


def rendering_hash(chat: Chat) -> str:
    """SHA-256 of all that turns text into ids: template, vocabulary, end token, and a probe."""
    parts = [
        chat.template_hash,
        sorted(chat.tokenizer.get_vocab().items()),
        chat.end_id,
        chat.prompt_ids(_RENDERING_PROBE),
        chat.response_ids(_RENDERING_PROBE),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def same_rendering(chat_a: Chat, chat_b: Chat) -> bool:
    """Whether two models' tokenizers and templates give the same ids for every text."""
    return rendering_hash(chat_a) == rendering_hash(chat_b)


def check_rendering(policy_chat: Chat, reward_chat: Chat, path: str) -> None:
    """Raises ValueError when policy and reward model at `path` would not read the same ids."""
    if same_rendering(policy_chat, reward_chat):
        return
    what = (
        "chat template"
        if policy_chat.template_hash != reward_chat.template_hash
        else "tokenizer (the chat templates are equal)"
    )
    raise ValueError(
        f"the reward model at {path} was trained with another {what} than the policy's: rendering "
        f"{rendering_hash(reward_chat)[:12]} against {rendering_hash(policy_chat)[:12]}; train it "
        "from the same SFT model"
    )


def _load_with_card(settings: ModelSettings) -> tuple[ScalarModel, RewardCard]:
    model = load_scalar(settings, new_head=False)
    card = RewardCard.load(settings.path)
    model.bias, model.scale = card.bias, card.scale
    return model, card


def _refuse_chance(path: str, card: RewardCard, allowed: bool) -> None:
    low, high = card.interval
    if low <= 0.5 and not allowed:
        raise ValueError(
            f"the reward model at {path} orders {card.pair_accuracy:.1%} of held-out pairs right, "
            f"with a 95 % interval of {low:.1%} to {high:.1%}: it may be no better than a coin; "
            "train it on more rankings, or set allow_chance_reward"
        )
