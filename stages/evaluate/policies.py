"""Measure each policy while it is in memory: its answers, their parts, its loss on text."""

import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.generation.answers import Answer
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import Packer
from rlhf.inputs.streams import torch_stream
from rlhf.measuring.fact_recall import fact_recall
from rlhf.models.layout import packer_for
from stages.evaluate.config import REWARD_MODEL, Config
from stages.evaluate.measures import (
    Answers,
    describe,
    estimate_kl,
    most_frequent_response,
    response_logprobs,
    sample,
    text_loss,
)
from stages.evaluate.parts import Grader, PartsByPrompt, describe_parts
from stages.evaluate.setup import Setup, load


@dataclass(frozen=True)
class Measurements:
    """Holds the policies' answers, and what was measured while each policy was in memory."""

    answers: dict[str, Answers] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, PartsByPrompt] = field(default_factory=dict)
    """Parts of gold for each policy's answers; empty without a grader."""
    pool: list[list[Answer]] = field(default_factory=list)
    """Several answers of the baseline to each prompt, for pairs and for best-of-n; empty if neither
    is wanted."""


def measure_policies(config: Config, setup: Setup, device: torch.device) -> Measurements:
    """Collect the answers and figures of each policy, with one policy in memory at a time.

    The baseline comes last, so that it can compute the log-probabilities of all other answers.
    """
    baseline = config.baseline_name
    others = [name for name in config.policies if name != baseline]
    answers: dict[str, Answers] = {}
    measured = Measurements(answers)
    for name in [*others, baseline]:
        started = time.monotonic()
        policy = load(config, setup, name)
        policy.to(device)  # type: ignore[arg-type]  # its wrapper hides the types of Module.to
        packer = packer_for(policy, config.micro_batch_tokens)
        answers[name] = _answer(config, setup, policy, packer, name)
        text, share = most_frequent_response(answers[name])
        figures = measured.figures[name] = {
            **describe(answers[name]),
            "most_frequent_response": {"text": text, "share": share},
        }
        if setup.grader is not None:
            measured.parts[name] = setup.grader.grade(answers[name].by_prompt)
            figures |= _measure_parts(
                config, setup, setup.grader, policy, name, measured.parts[name]
            )
        if setup.texts:
            label = f"{name} reads held-out text"
            figures["text_loss"] = text_loss(policy, setup.texts, packer, label)
        if setup.probes:
            figures["fact_recall"] = fact_recall(policy, setup.chat.tokenizer, setup.probes)
        if name == baseline:
            for other in others:
                trees, label = answers[other].trees, f"{name} reads {other}"
                ref_logprobs = response_logprobs(policy, trees, packer, config.temperature, label)
                measured.figures[other] |= estimate_kl(answers[other], ref_logprobs)
            if makes_pairs(config, setup) or config.best_of is not None:
                measured.pool.extend(_sample_pool(config, setup, policy, name))
        del policy
        print(f"evaluate: measured {name} in {time.monotonic() - started:.1f} s", flush=True)
    return measured


def makes_pairs(config: Config, setup: Setup) -> bool:
    """Return whether to test the reward model on pairs that differ in one part of gold."""
    is_judged = setup.grader is not None and REWARD_MODEL in setup.judges
    return is_judged and config.pair_samples_per_prompt > 0


def _measure_parts(
    config: Config,
    setup: Setup,
    grader: Grader,
    policy: PreTrainedModel,
    name: str,
    parts: PartsByPrompt,
) -> dict[str, Any]:
    """Describe the parts of the answers; if gold says what is right, also of greedy answers."""
    figures = describe_parts(parts, config.right_part, setup.kinds, config.seed)
    if "right" in figures:
        label = f"{name} answers greedily"
        chat = setup.chats[name]
        answers = _sample(config, setup, policy, chat, label, num_samples=1, temperature=0.0)
        greedy = grader.grade(answers)
        of_greedy = describe_parts(greedy, config.right_part, None, config.seed)
        figures["right_greedy"] = of_greedy["right"]
        figures["right_greedy_interval"] = of_greedy["right_interval"]
    return figures


def _sample_pool(
    config: Config, setup: Setup, policy: PreTrainedModel, name: str
) -> list[list[Answer]]:
    """Sample answers other than those that the policies are compared on."""
    for_pairs = config.pair_samples_per_prompt if makes_pairs(config, setup) else 0
    for_best = config.best_of_samples or config.best_of or 0
    return _sample(
        config,
        setup,
        policy,
        setup.chats[name],
        f"{name} answers several times",
        num_samples=max(for_pairs, for_best),
        temperature=config.temperature,
        stream="evaluate/pairs",
    )


def _answer(
    config: Config, setup: Setup, policy: PreTrainedModel, packer: Packer, name: str
) -> Answers:
    num_samples, temperature = config.samples_per_prompt, config.temperature
    label = f"{name} answers"
    drawn = _sample(
        config,
        setup,
        policy,
        setup.chats[name],
        label,
        num_samples=num_samples,
        temperature=temperature,
    )
    answers = Answers(drawn, [])
    label = f"{name} reads its answers"
    logprobs = response_logprobs(policy, answers.trees, packer, temperature, label)
    return replace(answers, logprobs=logprobs)


def _sample(
    config: Config,
    setup: Setup,
    policy: PreTrainedModel,
    chat: Chat,
    label: str,
    *,
    num_samples: int,
    temperature: float,
    stream: str = "evaluate/answers",
) -> list[list[Answer]]:
    """Sample answers to all prompts, with the draws of one stream."""
    return sample(
        policy,
        setup.prompts.kept,
        chat,
        config.generation,
        samples_per_prompt=num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        generator=torch_stream(config.seed, stream),
        label=label,
    )
