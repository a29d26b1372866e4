"""Trained reward models: their card, their golden rows, and how they read what a policy wrote."""

import json
import sys
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import fit_prompt
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.inputs.records import Demonstration, Prompt, PromptLike, naming_row, show
from rlhf.inputs.whole_files import write_text
from rlhf.models.adapters import find_adapter
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_scalar
from rlhf.models.passes import compute_scores
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import ALL_WEIGHTS, LoraSettings, ModelSettings
from rlhf.models.shared_bases import SharedBases, has_four_bits
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.rendering import check_rendering
from rlhf.rewards.scores import Scored

REWARD_FILE = "reward.json"
"""Beside the weights of a reward model: what the weights cannot hold."""

Dtype = Literal["float32", "bfloat16"]

DEFAULT_DTYPE: Dtype = "float32"
"""Of a reward model whose card does not say in which type it was measured."""

NUM_GOLDEN = 8
GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "4bit": 0.5}
"""Largest difference of a golden score, relative to max(1, |score|), by type of the weights; that
of 4 bits is of a base that is shared under QLoRA, which ran on tiny models only."""


@dataclass(frozen=True, kw_only=True)
class GoldenRow:
    """A prompt, a response and the score that the reward model gave when it was saved."""

    prompt: PromptLike
    response: str
    score: float

    def __post_init__(self) -> None:
        Demonstration(self.prompt, self.response)  # checks both
        _check_number("score", self.score)


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
    dtype: Dtype | None = None
    """Type of the weights with which everything here was measured; None: not recorded."""

    def __post_init__(self) -> None:
        for name in ("bias", "scale", "pair_accuracy"):
            _check_number(name, getattr(self, name))
        for bound in self.interval:
            _check_number("interval", bound)
        if self.dtype not in (None, *typing.get_args(Dtype)):
            raise ValueError(f"dtype is {show(self.dtype)}")

    def save(self, folder: str | Path) -> None:
        text = json.dumps(asdict(self), ensure_ascii=False, indent=2, allow_nan=False)
        write_text(Path(folder) / REWARD_FILE, text + "\n")

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
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
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
    ) -> Scored:
        """As Reward.score; only the ids are looked at."""
        return Scored(self.scores(prompt_ids, response_ids))

    def scores(
        self, prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]
    ) -> Tensor:
        """Scores (batch,), fp32, of responses; neighbours with one prompt share its pass.

        Raises:
            ValueError: a response has no token at all.
        """
        return compute_scores(self.model, trees_of(prompt_ids, response_ids), self.packer).float()

    @property
    def context(self) -> int | None:
        """Tokens that the model can read; None: any number."""
        return getattr(
            self.model.classifier.config.get_text_config(), "max_position_embeddings", None
        )

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
        dtype = "4bit" if has_four_bits(self.model) else dtype
        measured = self.card.dtype or DEFAULT_DTYPE
        tolerance = max(GOLDEN_TOLERANCE[dtype], GOLDEN_TOLERANCE[measured])
        for i, (row, score) in enumerate(zip(golden, found, strict=True)):
            if not abs(score - row.score) <= tolerance * max(1.0, abs(row.score)):
                raise ValueError(
                    f"the reward model scores golden row {i} at {score:.4f}, and {row.score:.4f} "
                    f"when it was saved ({dtype}, tolerance {tolerance}): its weights, "
                    f"tokenizer or chat template changed since; copy the whole folder again or "
                    f"train it again{self._other_type(dtype)}"
                )

    def _other_type(self, dtype: str) -> str:
        """What to try where the type of the weights may be the cause."""
        if self.card.dtype is None:
            return (
                f". {REWARD_FILE} does not say in which type it was measured; if that was not "
                f"{dtype}, give the other one as reward.dtype (float32 or bfloat16)"
            )
        if self.card.dtype == dtype:
            return ""
        return f". It was measured in {self.card.dtype}: reward.dtype measured reads it so"


class TextRewardModel:
    """A reward model whose tokenizer or chat template is not the policy's, so it reads text.

    It sees the prompt record and the decoded response in its own rendering. A response that has
    its end token gets the reward model's own; one that was cut gets none. Where a prompt and its
    response are longer than the reward model's context, the oldest turns are left out, whatever the
    policy could read.
    """

    def __init__(self, reward_model: RewardModel, policy_end_id: int) -> None:
        self.reward_model = reward_model
        self.policy_end_id = policy_end_id

    def score(
        self,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[Sequence[int]],
        response_ids: Sequence[Sequence[int]],
        responses: Sequence[str],
    ) -> Scored:
        """As Reward.score; of the response's ids only the last is looked at: is it the end?

        Raises:
            ValueError: a prompt's last turn and its response are longer than the model's context.
        """
        own_responses = [
            self._response_ids(text, ended=ids[-1] == self.policy_end_id)
            for text, ids in zip(responses, response_ids, strict=True)
        ]
        own_prompts = [
            self._prompt_ids(i, prompt, num_response_tokens=len(ids))
            for i, (prompt, ids) in enumerate(zip(prompts, own_responses, strict=True))
        ]
        return Scored(self.reward_model.scores(own_prompts, own_responses))

    def _response_ids(self, text: str, ended: bool) -> list[int]:
        """A cut response without any text is read as an empty one, since a score needs a token."""
        ids = self.reward_model.chat.response_ids(text)
        return ids if ended or len(ids) == 1 else ids[:-1]

    def _prompt_ids(self, i: int, prompt: Prompt, num_response_tokens: int) -> list[int]:
        chat, context = self.reward_model.chat, self.reward_model.context
        if context is None:
            with naming_row(prompt):
                return chat.prompt_ids(prompt.prompt)
        fitted = fit_prompt(prompt, chat, context - num_response_tokens)
        if fitted is None:
            place = prompt.place or f"row {i}"
            raise ValueError(
                f"the prompt of {place} is too long for the reward model, even its last turn "
                f"alone: the model reads {context} tokens, and the response takes "
                f"{num_response_tokens} of them; give shorter prompts or lower max_new_tokens"
            )
        return list(fitted.ids)


def measured_dtype(folder: str | Path) -> Dtype:
    """The type in which a reward model was measured, and so is to be read.

    Raises:
        ValueError: the folder's reward.json cannot be read.
    """
    if not (Path(folder) / REWARD_FILE).is_file():
        return DEFAULT_DTYPE  # load_reward_model says what is missing
    return RewardCard.load(folder).dtype or DEFAULT_DTYPE


def load_reward_model(
    settings: ModelSettings,
    *,
    micro_batch_tokens: int,
    device: torch.device | str = "cpu",
    policy_chat: Chat | None = None,
    allow_chance_reward: bool = False,
    bases: SharedBases | None = None,
) -> RewardModel:
    """A folder of the rm stage, its golden rows scored again.

    Args:
        policy_chat: Rendering of the policy that is to be scored; None: not compared.
        allow_chance_reward: Load it even if it may be no better than a coin.
        bases: Holds frozen weights for several models; None: the model's weights are its own.

    Raises:
        ValueError: no head, no reward.json, another rendering than the policy's, an accuracy that
            may be chance, or golden scores that changed.
    """
    model, card = _load_with_card(settings, bases=bases)
    chat = load_chat(settings)
    if policy_chat is not None:
        check_rendering(policy_chat, chat, settings.path)
    _refuse_chance(settings.path, card, allow_chance_reward)
    model.to(device).requires_grad_(False)
    reward = RewardModel(model, card, chat, packer_for(model.classifier, micro_batch_tokens))
    reward.recheck()
    return reward


def load_value_model(
    settings: ModelSettings, lora: LoraSettings = ALL_WEIGHTS, bases: SharedBases | None = None
) -> ScalarModel:
    """The value model that PPO starts from: the reward model, in units of its scores.

    Args:
        lora: As in load_policy, but an adapter that the folder holds keeps its own settings.
        bases: As in load_reward_model.

    Raises:
        ValueError: the folder has no head or no reward.json.
    """
    adapter = find_adapter(settings.path)
    if adapter is not None and lora.rank:
        lora = replace(lora, rank=adapter.rank, alpha=adapter.alpha, target_modules="all-linear")
    return _load_with_card(settings, lora, bases)[0]


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


def _load_with_card(
    settings: ModelSettings, lora: LoraSettings = ALL_WEIGHTS, bases: SharedBases | None = None
) -> tuple[ScalarModel, RewardCard]:
    model = load_scalar(settings, new_head=False, lora=lora, bases=bases)
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


def _check_number(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not abs(value) <= sys.float_info.max:
        raise ValueError(f"{name} is {show(value)} and no finite number")
