"""Load what is the same for every policy: chats, prompts, texts and judges."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records
from rlhf.inputs.fitting import FittedPrompts, fit_prompts
from rlhf.inputs.packing import PromptTree, text_tree
from rlhf.inputs.records import Prompt, Text, naming_row
from rlhf.inputs.streams import python_stream
from rlhf.models.limits import check_vocabulary
from rlhf.models.loading import load_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.functions import FunctionReward, load_function
from rlhf.rewards.load import load_reward_model_for_policy
from rlhf.rewards.models import measured_dtype
from rlhf.rewards.rendering import same_rendering
from rlhf.rewards.scores import Reward
from rlhf.runs.folder import RESULTS
from stages.evaluate.config import GOLD, REWARD_MODEL, Config
from stages.evaluate.parts import Grader, find_grader

_FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")
"""Matches package.module:name."""


@dataclass(frozen=True)
class Setup:
    """Holds what is the same for every policy: the questions, and the judges."""

    chat: Chat
    """The baseline's chat, whose rendering all policies share."""
    chats: dict[str, Chat]
    """The chat of each policy, with the end tokens that its own files declare."""
    prompts: FittedPrompts[Prompt]
    texts: list[PromptTree]
    probes: list[Prompt]
    judges: dict[str, Reward]
    """Maps names to judges: "gold" and "rm" if they are given, then those of the settings. The
    first one decides the win rates."""
    grader: Grader | None
    """Gives the parts of gold. None means that there is no gold, or that it has no parts."""
    kinds: list[str] | None
    """Kind of each question. None means that gold does not give kinds."""


def set_up(config: Config, device: torch.device) -> Setup:
    """Load prompts, texts and judges, so that faults in them are found before any sampling."""
    chats = _common_chats(config)
    chat = chats[config.baseline_name]
    prompts = fit_prompts(_draw_prompts(config), chat, config.max_prompt_tokens)
    _check_prompts(config, prompts)
    texts: list[PromptTree] = []
    probes: list[Prompt] = []
    if config.held_out_text is not None:
        records = read_records(config.held_out_text, Text, limit=config.num_texts)
        ids = [_text_ids(record, chat)[: config.max_text_tokens] for record in records]
        texts = [text_tree(document) for document in ids if len(document) > 1]
    if config.fact_probe is not None:
        probes = read_records(config.fact_probe, Prompt)
    gold = _load_gold(config)
    grader = find_grader(gold, config.gold or GOLD)
    return Setup(
        chat,
        chats,
        prompts,
        texts,
        probes,
        judges=_load_judges(config, gold, chat, device),
        grader=grader,
        kinds=None if grader is None else grader.kinds([prompt.record for prompt in prompts.kept]),
    )


def inputs_of(config: Config) -> dict[str, str]:
    """Return the inputs that must exist, and the files of other runs whose figures are shown."""
    optional = {
        "reward_model": config.reward_model,
        "gold_path": config.gold_path,
        "held_out_text": config.held_out_text,
        "fact_probe": config.fact_probe,
    }
    return {
        **{f"policies.{name}": path for name, path in config.policies.items()},
        "prompts": config.prompts,
        **{name: path for name, path in optional.items() if path is not None},
        **{f"judges.{n}": judge for n, judge in config.judges.items() if not _is_function(judge)},
        **{f"reports.{name}": path for name, path in config.reports.items()},
        **{
            f"{section}.{name}.{RESULTS}": str(Path(folder) / RESULTS)
            for section in ("reports", "stages")
            for name, folder in getattr(config, section).items()
            if (Path(folder) / RESULTS).is_file()
        },
    }


def _text_ids(record: Text, chat: Chat) -> list[int]:
    with naming_row(record):
        return chat.text_ids(record.text)


def _common_chats(config: Config) -> dict[str, Chat]:
    """Load every policy's chat, and check that all render as the baseline does.

    Raises:
        ValueError: A policy has another tokenizer or chat template.
    """
    chats = {name: load_chat(model_settings(config, name)) for name in config.policies}
    baseline = config.baseline_name
    for name, chat in chats.items():
        if not same_rendering(chats[baseline], chat):
            raise ValueError(
                f"policy {name} at {config.policies[name]} has another tokenizer or chat template "
                f"than the baseline {baseline} at {config.policies[baseline]}, so they cannot be "
                "compared token by token; evaluate it in a run of its own"
            )
    return chats


def _draw_prompts(config: Config) -> list[Prompt]:
    """Read all prompts, or draw as many as are wanted, in the order of the file."""
    records = read_records(config.prompts, Prompt)
    if len(records) <= config.num_prompts:
        return records
    draw = python_stream(config.seed, "evaluate/prompts")
    drawn = draw.sample(range(len(records)), k=config.num_prompts)
    return [records[i] for i in sorted(drawn)]


def _check_prompts(config: Config, prompts: FittedPrompts[Prompt]) -> None:
    """Print how many prompts did not fit; raise a ValueError if too few did."""
    limit = f"max_prompt_tokens {config.max_prompt_tokens}"
    prompts.check_dropped(limit, config.max_dropped)
    text = prompts.describe(limit)
    if text is not None:
        print(f"evaluate: {text}")
    if len(prompts.kept) < 2:
        raise ValueError(
            f"{config.prompts}: {len(prompts.kept)} of {prompts.num_read} prompts fit {limit}, and "
            "an evaluation needs 2; raise it or give more prompts"
        )


def _load_gold(config: Config) -> Callable[..., Any] | None:
    if config.gold is None:
        return None
    arguments = () if config.gold_path is None else (config.gold_path,)
    return load_function(config.gold)(*arguments)


def _load_judges(
    config: Config, gold: Callable[..., Any] | None, chat: Chat, device: torch.device
) -> dict[str, Reward]:
    def load_model(path: str) -> Reward:
        return load_reward_model_for_policy(
            ModelSettings(
                path=path,
                dtype=measured_dtype(path),
                attention=config.attention,
                trust_remote_code=config.trust_remote_code,
            ),
            chat,
            micro_batch_tokens=config.micro_batch_tokens,
            device=device,
            allow_chance_reward=config.allow_chance_reward,
        )

    judges: dict[str, Reward] = {}
    if gold is not None:
        assert config.gold is not None
        judges[GOLD] = _gold_reward(gold, config.gold)
    if config.reward_model is not None:
        judges[REWARD_MODEL] = load_model(config.reward_model)
    for name, judge in config.judges.items():
        is_function = _is_function(judge)
        judges[name] = (
            FunctionReward(load_function(judge), judge) if is_function else load_model(judge)
        )
    return judges


def _is_function(judge: str) -> bool:
    """Return whether an entry of `judges` is package.module:name, and not a folder or hub id."""
    return _FUNCTION.fullmatch(judge) is not None and not Path(judge).exists()


def _gold_reward(gold: Callable[..., list[float]], name: str) -> Reward:
    return FunctionReward(lambda prompts, responses, metas: gold(prompts, responses), name)


def load(config: Config, setup: Setup, name: str) -> PreTrainedModel:
    """Load a policy; raise a ValueError if it cannot read these prompts and responses."""
    path = config.policies[name]
    policy = load_policy(model_settings(config, name))
    check_vocabulary(policy, setup.chat, path)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    needed = {
        "max_prompt_tokens + max_new_tokens": config.max_prompt_tokens + config.max_new_tokens,
        "max_text_tokens": config.max_text_tokens if setup.texts else 0,
    }
    for names, tokens in needed.items():
        if context is not None and tokens > context:
            raise ValueError(
                f"{names} is {tokens}, but policy {name} at {path} reads {context} tokens at most; "
                "give fewer"
            )
    return policy


def model_settings(config: Config, name: str) -> ModelSettings:
    return ModelSettings(
        path=config.policies[name],
        dtype=config.dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )
