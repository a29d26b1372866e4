"""Measure a policy on held-out data: losses, and samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.inputs.records import Demonstration, prompt_key
from rlhf.inputs.streams import torch_stream
from rlhf.models.passes import compute_logprobs
from rlhf.rewards.models import RewardModel
from stages.sft.config import Config
from stages.sft.rows import Example


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Holds a held-out prompt and the policy's response."""

    record: Demonstration
    prompt: list[int]
    response: list[int]
    text: str
    """The response, decoded."""
    ended: bool
    """Whether the response has an end token."""


def mean_loss(policy: PreTrainedModel, trees: Sequence[PromptTree], packer: Packer) -> float:
    """Return the mean -log-probability of the trees' response tokens, in nats."""
    num_tokens = sum(len(response) for tree in trees for response in tree.responses)
    return -compute_logprobs(policy, trees, packer).double().sum().item() / num_tokens


def draw_samples(
    policy: PreTrainedModel, examples: Sequence[Example], chat: Chat, config: Config
) -> list[Sample]:
    """Sample one response to each of the first num_samples different prompts, with the same random
    draws each time."""
    chosen = list({prompt_key(one.record.prompt): one for one in examples}.values())
    chosen = chosen[: config.num_samples]
    prompts = [list(one.tree.prompt) for one in chosen]
    samples = generate(
        policy,
        prompts,
        config.generation,
        Decoding(
            end_id=chat.end_id,
            other_ends=chat.other_ends,
            max_new_tokens=config.max_response_tokens,
            temperature=config.temperature,
        ),
        generator=torch_stream(config.seed, "sft/samples"),
    )
    return [
        Sample(
            record=one.record,
            prompt=prompt,
            response=response,
            text=chat.decode(response),
            ended=chat.has_end(response),
        )
        for one, prompt, response in zip(chosen, prompts, samples.responses, strict=True)
    ]


def score_samples(samples: Sequence[Sample], reward_model: RewardModel, chat: Chat) -> list[float]:
    """Return the reward model's score of each sample, with the end token of the chat template."""
    prompts = [sample.prompt for sample in samples]
    responses = [chat.with_own_end(sample.response) for sample in samples]
    return reward_model.scores(prompts, responses).tolist()


def sample_rows(samples: Sequence[Sample], scores: Sequence[float] | None) -> list[dict[str, Any]]:
    """Make the rows of samples.jsonl, with the policy's response beside the demonstration."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": sample.record.prompt,
            "response": sample.text,
            "demonstration": sample.record.response,
            "ended": sample.ended,
        }
        for sample in samples
    ]
    if scores is not None:
        rows = [{**row, "score": score} for row, score in zip(rows, scores, strict=True)]
    return rows
