"""Loads trained reward models, checks their scores, and lets them read what a policy wrote."""

import json
import sys
import typing
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf.generation.answers import Answer
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
from rlhf.models.settings import NO_LORA, LoraSettings, ModelSettings
from rlhf.models.shared_bases import SharedBases, has_four_bits
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.rendering import check_rendering
from rlhf.rewards.scores import Scored
from rlhf.training.offloading import on_device

REWARD_FILE = "reward.json"
"""The file next to a reward model's weights that holds what the weights cannot."""

Dtype = Literal["float32", "bfloat16"]

DEFAULT_DTYPE: Dtype = "float32"
"""Type of a reward model whose card does not record in which type it was measured."""

NUM_GOLDEN = 8
"""Rows whose scores a reward card keeps; they are scored again at every load."""
GOLDEN_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25, "4bit": 0.5}
"""Largest difference of a golden score, relative to max(1, |score|), by type of the weights. 4bit
is for a base shared under QLoRA, which was tested on tiny models only."""


@dataclass(frozen=True, kw_only=True)
class GoldenRow:
    """Holds a prompt, a response and the score that the reward model gave when it was saved."""

    prompt: PromptLike
    response: str
    score: float

    def __post_init__(self) -> None:
        Demonstration(self.prompt, self.response)  # its own checks cover both
        _check_number("score", self.score)


@dataclass(frozen=True, kw_only=True)
class RewardCard:
    """Holds the content of reward.json.

    score = scale * (the classifier's output - bias)
    """

    bias: float
    """Mean output for the demonstrations, so that they score 0 (Ouyang et al. 2022, 3.5)."""
    scale: float
    """1 unless a user sets it. InstructGPT shifts its rewards and does not scale them."""
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
    """Type of the weights in all measurements here. None means not recorded."""

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
        """Load the card. Raises ValueError if the folder holds no readable reward.json."""
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
                f"{path} is not a reward card of the rm stage ({error}); run that stage again"
            ) from error


class RewardModel:
    """A trained reward model with its bias and scale. It scores without dropout or gradient."""

    def __init__(self, model: ScalarModel, card: RewardCard, chat: Chat, packer: Packer) -> None:
        self.model = model
        self.card = card
        self.chat = chat
        self.packer = packer

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does, from the ids alone."""
        return Scored(
            self.scores(
                [one.prompt_ids for one in answers],
                [one.ids_ending_with(self.chat.end_id) for one in answers],
            )
        )

    def scores(
        self, prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]
    ) -> Tensor:
        """Return fp32 scores (batch,). Neighbours with the same prompt share its pass.

        Raises:
            ValueError: A response has no tokens.
        """
        return compute_scores(self.model, trees_of(prompt_ids, response_ids), self.packer).float()

    @property
    def context(self) -> int | None:
        """Most tokens that the model can read. None means any number."""
        return getattr(
            self.model.classifier.config.get_text_config(), "max_position_embeddings", None
        )

    def check_golden_rows(self) -> None:
        """Score the golden rows again.

        Raises:
            ValueError: A score differs from when the model was saved.
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
                    f"train it again{self._dtype_hint(dtype)}"
                )

    def _dtype_hint(self, dtype: str) -> str:
        """Say what to try if the type of the weights may be the cause."""
        if self.card.dtype is None:
            return (
                f". {REWARD_FILE} does not say in which type it was measured; if that was not "
                f"{dtype}, give the other one as reward.dtype (float32 or bfloat16)"
            )
        if self.card.dtype == dtype:
            return ""
        return f". It was measured in {self.card.dtype}: reward.dtype measured reads it so"


class TextRewardModel:
    """A reward model that reads text, because the policy has another tokenizer or chat template.

    It renders the prompt record and the decoded response in its own way. A finished response gets
    the reward model's own end token; a cut one gets none. If prompt and response are longer than
    the reward model's context, the oldest turns are left out, even if the policy could read them.
    """

    def __init__(self, reward_model: RewardModel) -> None:
        self.reward_model = reward_model

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does, from records and texts alone.

        Raises:
            ValueError: A prompt's last turn and its response are longer than the model's context.
        """
        own_responses = [self._response_ids(one.text, ended=one.is_finished) for one in answers]
        own_prompts = [
            self._prompt_ids(i, one.record, num_response_tokens=len(ids))
            for i, (one, ids) in enumerate(zip(answers, own_responses, strict=True))
        ]
        return Scored(self.reward_model.scores(own_prompts, own_responses))

    def _response_ids(self, text: str, ended: bool) -> list[int]:
        """Render a response. If cut and empty, it keeps its end, because a score needs a token."""
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
    """Return the type in which a reward model was measured; it should be loaded in that type.

    Raises:
        ValueError: The folder's reward.json cannot be read.
    """
    if not (Path(folder) / REWARD_FILE).is_file():
        return DEFAULT_DTYPE  # load_reward_model reports what is missing
    return RewardCard.load(folder).dtype or DEFAULT_DTYPE


def load_reward_model(
    settings: ModelSettings,
    *,
    micro_batch_tokens: int,
    device: torch.device | str = "cpu",
    policy_chat: Chat | None = None,
    allow_chance_reward: bool = False,
    bases: SharedBases | None = None,
    offload: bool = False,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> RewardModel:
    """Load a folder of the rm stage and score its golden rows again.

    Args:
        device: Where the model scores.
        policy_chat: Rendering of the policy whose responses will be scored. None compares nothing.
        allow_chance_reward: Whether to load a model that may be no better than chance.
        bases: Holds frozen weights for several models. None gives the model its own weights.
        offload: Whether the model is in CPU memory outside this function.
        autocast: Makes the context of precision in which the model will score. Packing is tested
            in it. Golden rows are scored in the type of the weights, as they were measured.

    Raises:
        ValueError: There is no head or no reward.json, the policy's rendering differs, the accuracy
            may be chance, or golden scores have changed.
    """
    model, card = _load_with_card(settings, bases=bases)
    chat = load_chat(settings)
    if policy_chat is not None:
        check_rendering(policy_chat, chat, settings.path)
    _refuse_chance(settings.path, card, allow_chance_reward)
    model.requires_grad_(False)
    if not offload:
        model.to(device)
    with on_device([model], torch.device(device), offload):
        with autocast():
            packer = packer_for(model.classifier, micro_batch_tokens)
        reward = RewardModel(model, card, chat, packer)
        reward.check_golden_rows()
    return reward


def load_value_model(
    settings: ModelSettings, lora: LoraSettings = NO_LORA, bases: SharedBases | None = None
) -> ScalarModel:
    """Load the value model that PPO starts from: the reward model, with its bias and scale.

    Args:
        lora: As in load_policy, but an adapter in the folder keeps its own settings.
        bases: As in load_reward_model.

    Raises:
        ValueError: The folder has no head or no reward.json.
    """
    adapter = find_adapter(settings.path)
    if adapter is not None and lora.rank:
        lora = replace(lora, rank=adapter.rank, alpha=adapter.alpha, target_modules="all-linear")
    return _load_with_card(settings, lora, bases)[0]


def trees_of(
    prompt_ids: Sequence[Sequence[int]], response_ids: Sequence[Sequence[int]]
) -> list[PromptTree]:
    """Make one tree for each run of neighbours with the same prompt; the order is kept."""
    rows = zip(prompt_ids, response_ids, strict=True)
    pairs = [(tuple(prompt), tuple(response)) for prompt, response in rows]
    return [
        PromptTree(prompt, tuple(response for _, response in group))
        for prompt, group in groupby(pairs, key=lambda pair: pair[0])
    ]


def _load_with_card(
    settings: ModelSettings, lora: LoraSettings = NO_LORA, bases: SharedBases | None = None
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
        raise ValueError(f"{name} is {show(value)} and not a finite number")
