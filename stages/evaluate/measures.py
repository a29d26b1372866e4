"""Measure a policy: sample responses, compute their probabilities and scores, and compare."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from rlhf.generation.answers import Answer, sample_answers
from rlhf.generation.engines import engine_of
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.inputs.records import Prompt
from rlhf.maths.kl import k1, k3
from rlhf.measuring.statistics import (
    Estimate,
    bootstrap_interval,
    difference_at_equal_length,
    distinct_bigrams,
    mean_and_error,
    most_frequent_answer,
    paired_difference,
    win_rate,
)
from rlhf.models.passes import compute_logprobs
from rlhf.rewards.scores import Reward
from rlhf.runs.stopwatch import progress_shown

PASSES_BETWEEN_TICKS = 4
"""Passes through the model between two updates of a progress bar."""

Scores = list[list[float]]
"""Scores of each prompt's responses."""


@dataclass(frozen=True)
class Answers:
    """Holds one policy's answers to all prompts."""

    by_prompt: list[list[Answer]]
    """The answers to each prompt."""
    logprobs: list[Tensor]
    """Log-probabilities (time,) of each response under the policy, in nats, in the same order."""

    @property
    def flat(self) -> list[Answer]:
        """All answers, in the order of the prompts."""
        return [answer for group in self.by_prompt for answer in group]

    @property
    def lengths(self) -> "Scores":
        """Tokens of each answer, by prompt."""
        return [[float(len(answer.response_ids)) for answer in group] for group in self.by_prompt]

    @property
    def trees(self) -> list[PromptTree]:
        """One tree for each prompt, with its responses."""
        return [
            PromptTree(group[0].prompt_ids, tuple(one.response_ids for one in group))
            for group in self.by_prompt
        ]


def sample(
    policy: PreTrainedModel,
    prompts: Sequence[FittedPrompt[Prompt]],
    chat: Chat,
    settings: GenerationSettings,
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    label: str,
) -> list[list[Answer]]:
    """Sample the answers to each prompt.

    Equal policies with equal generators give equal answers.
    """
    repeated = [prompt for prompt in prompts for _ in range(samples_per_prompt)]
    with (
        engine_of(policy, settings) as engine,
        progress_shown(f"evaluate: {label}", len(repeated)) as progress,
    ):
        answers = iter(
            sample_answers(
                engine,
                repeated,
                chat,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                generator=generator,
                progress=progress,
            )
        )
    return [list(islice(answers, samples_per_prompt)) for _ in prompts]


def response_logprobs(
    policy: PreTrainedModel,
    trees: Sequence[PromptTree],
    packer: Packer,
    temperature: float,
    label: str,
) -> list[Tensor]:
    """Return the log-probabilities (time,) of each response in nats, in the order of the trees."""
    logprobs: list[Tensor] = []
    with progress_shown(f"evaluate: {label}", len(trees)) as progress:
        for chunk in _chunks(trees, PASSES_BETWEEN_TICKS * packer.micro_batch_tokens):
            batch = compute_logprobs(policy, chunk, packer, temperature=temperature)
            lengths = [len(response) for tree in chunk for response in tree.responses]
            logprobs += [row[:length] for row, length in zip(batch, lengths, strict=True)]
            progress(len(chunk))
    return logprobs


def describe(answers: Answers) -> dict[str, float]:
    """Compute the mean length, the share that ends, and the share of distinct bigrams."""
    flat = answers.flat
    responses = [answer.response_ids for answer in flat]
    return {
        "response_tokens": sum(map(len, responses)) / len(responses),
        "eos_rate": sum(answer.is_finished for answer in flat) / len(flat),
        "distinct_2": distinct_bigrams(responses),
    }


def most_frequent_response(answers: Answers) -> tuple[str, float]:
    """Return the most frequent response, and the share of different prompts that get it."""
    by_prompt: dict[str, list[str]] = defaultdict(list)
    for answer in answers.flat:
        by_prompt[answer.record.key].append(answer.text)
    return most_frequent_answer(list(by_prompt.values()))


def text_loss(
    policy: PreTrainedModel, texts: Sequence[PromptTree], packer: Packer, label: str
) -> float:
    """Return the mean loss on plain text in nats a token, over all tokens but each text's first."""
    logprobs = response_logprobs(policy, texts, packer, 1.0, label)
    return -torch.cat(logprobs).double().mean().item()


def estimate_kl(answers: Answers, ref_logprobs: Sequence[Tensor]) -> dict[str, float]:
    """Estimate KL(policy || reference) in nats a response, on the policy's own responses.

    `kl` is the mean of sum_t k1, and `kl_error` its standard error over prompts. `kl_k3` is the
    mean of sum_t k3, which has the same expectation and is never negative (see rlhf/maths/kl.py).
    """
    logprobs = pad_sequence(answers.logprobs, batch_first=True)
    references = pad_sequence(list(ref_logprobs), batch_first=True)
    lengths = torch.tensor([len(row) for row in answers.logprobs])
    response_mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    by_response = k1(logprobs, references, response_mask).double().sum(1)
    prompt_means = [float(torch.stack(group).mean()) for group in _by_prompt(answers, by_response)]
    kl, error = mean_and_error(prompt_means)
    low_variance = k3(logprobs, references, response_mask).double().sum(1)
    return {"kl": kl, "kl_error": error, "kl_k3": low_variance.mean().item()}


def score_all(
    judges: Mapping[str, Reward], answers: Mapping[str, Answers]
) -> dict[str, dict[str, Scores]]:
    """Let every judge score the answers of every policy: judge -> policy -> scores."""
    scores: dict[str, dict[str, Scores]] = {judge: {} for judge in judges}
    total = len(judges) * sum(len(of.flat) for of in answers.values())
    with progress_shown("evaluate: judges score", total) as progress:
        for judge, reward in judges.items():
            for name, of in answers.items():
                scores[judge][name] = score(reward, of)
                progress(len(of.flat))
    return scores


def score(reward: Reward, answers: Answers) -> Scores:
    """Return the scores of all answers, grouped by prompt."""
    scores = reward.score(answers.flat).scores
    return [[float(value) for value in group] for group in _by_prompt(answers, scores)]


def compare(
    name: str,
    baseline: str,
    scores: dict[str, dict[str, Scores]],
    lengths: Mapping[str, Scores],
    seed: int,
) -> dict[str, Any]:
    """Compute a policy's mean score by each judge, its gain, and how often it beats the baseline.

    Args:
        scores: maps judge to policy to scores. The first judge gives `win_rate_vs_BASELINE`. The
            other judges give `win_rate_vs_BASELINE_by_JUDGE`.
        lengths: maps policy to the tokens of each prompt's responses.
    """
    figures: dict[str, Any] = {}
    for number, (judge, by_policy) in enumerate(scores.items()):
        own = by_policy[name]
        values = [value for group in own for value in group]
        figures[f"{judge}_score"] = sum(values) / len(values)
        figures[f"{judge}_score_interval"] = bootstrap_interval(own, seed)
        if name != baseline:
            base = by_policy[baseline]
            figures |= gain(judge, own, base, baseline, seed)
            change = difference_at_equal_length(own, base, lengths[name], lengths[baseline], seed)
            if not math.isnan(change.value):
                figures |= _with_interval(f"{judge}_gain_at_equal_length_vs_{baseline}", change)
            key = win_rate_key(baseline, None if number == 0 else judge)
            figures |= _with_interval(key, win_rate(own, base, seed))
    return figures


def win_rate_key(baseline: str, judge: str | None) -> str:
    """Return the key of a win rate in results.json. None means the judge that decides."""
    return f"win_rate_vs_{baseline}" + ("" if judge is None else f"_by_{judge}")


def gain(what: str, own: Scores, base: Scores, baseline: str, seed: int) -> dict[str, Any]:
    """Compute `WHAT_gain_vs_BASELINE`: the mean over prompts of own minus base, with its interval.

    Pairing by prompt takes the difficulty of the prompts out of the interval.
    """
    return _with_interval(f"{what}_gain_vs_{baseline}", paired_difference(own, base, seed))


def _with_interval(key: str, estimate: Estimate) -> dict[str, Any]:
    return {key: estimate.value, f"{key}_interval": estimate.interval}


def _by_prompt(answers: Answers, values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split values (responses,) into one group for each prompt."""
    return (group.unbind() for group in values.split([len(group) for group in answers.by_prompt]))


def _chunks(trees: Sequence[PromptTree], max_tokens: int) -> Iterator[list[PromptTree]]:
    """Yield neighbouring trees of at most this many tokens in all, but always at least one tree."""
    chunk: list[PromptTree] = []
    num_tokens = 0
    for tree in trees:
        if chunk and num_tokens + tree.num_tokens > max_tokens:
            yield chunk
            chunk, num_tokens = [], 0
        chunk.append(tree)
        num_tokens += tree.num_tokens
    if chunk:
        yield chunk
