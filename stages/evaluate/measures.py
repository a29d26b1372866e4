"""Measure a policy: sample responses, compute their probabilities and scores, and compare."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.inputs.records import Prompt
from rlhf.maths.kl import k1, k3
from rlhf.measuring.statistics import (
    bootstrap_interval,
    distinct_bigrams,
    mean_and_error,
    most_frequent_answer,
    paired_difference,
    win_rate,
)
from rlhf.models.passes import compute_logprobs
from rlhf.rewards.scores import Reward

PASSES_BETWEEN_TICKS = 4
"""Passes through the model between two updates of a progress bar."""

Scores = list[list[float]]
"""Scores of each prompt's responses."""


@dataclass(frozen=True)
class Answers:
    """Holds one policy's responses to all prompts."""

    trees: list[PromptTree]
    """One tree for each prompt, with its responses."""
    logprobs: list[Tensor]
    """Log-probabilities (time,) of each response under the policy, in nats, in the order of the
    trees."""

    @property
    def responses(self) -> list[tuple[int, ...]]:
        return [response for tree in self.trees for response in tree.responses]


def sample(
    policy: PreTrainedModel,
    prompt_ids: Sequence[tuple[int, ...]],
    settings: GenerationSettings,
    *,
    end_id: int,
    samples_per_prompt: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    label: str,
    other_ends: tuple[int, ...] = (),
) -> list[PromptTree]:
    """Sample responses, and return one tree for each prompt.

    Equal policies with equal generators give equal responses.
    """
    repeated = [ids for ids in prompt_ids for _ in range(samples_per_prompt)]
    with _bar(label, len(repeated)) as bar:
        samples = generate(
            policy,
            repeated,
            settings,
            Decoding(
                end_id=end_id,
                other_ends=other_ends,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
            ),
            generator=generator,
            progress=bar.update,
        )
    responses = iter(samples.responses)
    return [
        PromptTree(ids, tuple(tuple(one) for one in islice(responses, samples_per_prompt)))
        for ids in prompt_ids
    ]


def response_logprobs(
    policy: PreTrainedModel,
    trees: Sequence[PromptTree],
    packer: Packer,
    temperature: float,
    label: str,
) -> list[Tensor]:
    """Return the log-probabilities (time,) of each response in nats, in the order of the trees."""
    logprobs: list[Tensor] = []
    with _bar(label, len(trees)) as bar:
        for chunk in _chunks(trees, PASSES_BETWEEN_TICKS * packer.micro_batch_tokens):
            batch = compute_logprobs(policy, chunk, packer, temperature=temperature)
            lengths = [len(response) for tree in chunk for response in tree.responses]
            logprobs += [row[:length] for row, length in zip(batch, lengths, strict=True)]
            bar.update(len(chunk))
    return logprobs


def describe(answers: Answers, end_id: int, other_ends: tuple[int, ...] = ()) -> dict[str, float]:
    """Compute means over responses of what the responses alone show."""
    responses = answers.responses
    ends = {end_id, *other_ends}
    return {
        "response_tokens": sum(map(len, responses)) / len(responses),
        "eos_rate": sum(response[-1] in ends for response in responses) / len(responses),
        "distinct_2": distinct_bigrams(responses),
    }


def most_frequent_response(
    questions: Sequence[Prompt], chat: Chat, answers: Answers
) -> tuple[str, float]:
    """Return the response that the most different prompts get, and their share of all prompts."""
    by_prompt: dict[str, list[str]] = defaultdict(list)
    for question, tree in zip(questions, answers.trees, strict=True):
        by_prompt[question.key] += [chat.decode(response) for response in tree.responses]
    return most_frequent_answer(list(by_prompt.values()))


def text_loss(
    policy: PreTrainedModel, texts: Sequence[PromptTree], packer: Packer, label: str
) -> float:
    """Return the mean loss on plain text in nats a token, over all tokens but each text's first."""
    logprobs = response_logprobs(policy, texts, packer, 1.0, label)
    return -torch.cat(logprobs).double().mean().item()


def divergence(answers: Answers, ref_logprobs: Sequence[Tensor]) -> dict[str, float]:
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


def score(reward: Reward, questions: Sequence[Prompt], chat: Chat, answers: Answers) -> Scores:
    """Return the scores of all responses, grouped by prompt.

    The judge reads each response with the end token of the chat template.
    """
    rows = [
        (question, tree.prompt, chat.with_own_end(response))
        for question, tree in zip(questions, answers.trees, strict=True)
        for response in tree.responses
    ]
    scores = reward.score(
        [question for question, _, _ in rows],
        [prompt for _, prompt, _ in rows],
        [response for _, _, response in rows],
        [chat.decode(response) for _, _, response in rows],
    ).scores
    return [[float(value) for value in group] for group in _by_prompt(answers, scores)]


def compare(
    name: str, baseline: str, scores: dict[str, dict[str, Scores]], seed: int
) -> dict[str, Any]:
    """Compute a policy's mean score by each judge, its gain, and how often it beats the baseline.

    Args:
        scores: maps judge to policy to scores. The first judge gives `win_rate_vs_BASELINE`. The
            other judges give `win_rate_vs_BASELINE_by_JUDGE`.
    """
    figures: dict[str, Any] = {}
    for number, (judge, by_policy) in enumerate(scores.items()):
        own = by_policy[name]
        values = [value for group in own for value in group]
        figures[f"{judge}_score"] = sum(values) / len(values)
        figures[f"{judge}_score_interval"] = bootstrap_interval(own, seed)
        if name != baseline:
            figures |= gain(judge, own, by_policy[baseline], baseline, seed)
            key = win_rate_key(baseline, None if number == 0 else judge)
            figures[key], figures[f"{key}_interval"] = win_rate(own, by_policy[baseline], seed)
    return figures


def win_rate_key(baseline: str, judge: str | None) -> str:
    """Return the key of a win rate in results.json. None means the judge that decides."""
    return f"win_rate_vs_{baseline}" + ("" if judge is None else f"_by_{judge}")


def gain(what: str, own: Scores, base: Scores, baseline: str, seed: int) -> dict[str, Any]:
    """Compute `WHAT_gain_vs_BASELINE`: the mean over prompts of own minus base, with its interval.

    Pairing by prompt takes the difficulty of the prompts out of the interval.
    """
    change = paired_difference(own, base, seed)
    key = f"{what}_gain_vs_{baseline}"
    return {key: change.value, f"{key}_interval": change.interval}


def _by_prompt(answers: Answers, values: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split values (responses,) into one group for each prompt."""
    return (group.unbind() for group in values.split([len(t.responses) for t in answers.trees]))


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


def _bar(label: str, total: int) -> "tqdm[Any]":
    return tqdm(total=total, desc=f"evaluate: {label}", leave=False)
