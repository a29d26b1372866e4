"""Measure a policy on held-out data: losses, and samples."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from rlhf.generation.answers import Answer, sample_answers
from rlhf.generation.engines import engine_of
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.inputs.records import Prompt
from rlhf.inputs.streams import torch_stream
from rlhf.models.passes import compute_logprobs
from stages.sft.config import Config
from stages.sft.rows import Example


def mean_loss(policy: PreTrainedModel, trees: Sequence[PromptTree], packer: Packer) -> float:
    """Return the mean -log-probability of the trees' response tokens, in nats."""
    num_tokens = sum(len(response) for tree in trees for response in tree.responses)
    return -compute_logprobs(policy, trees, packer).double().sum().item() / num_tokens


def draw_samples(
    policy: PreTrainedModel, examples: Sequence[Example], chat: Chat, config: Config
) -> list[Answer]:
    """Sample one answer to each prompt, with the same random draws each time."""
    with engine_of(policy, config.generation) as engine:
        return sample_answers(
            engine,
            [FittedPrompt(Prompt(one.record.prompt), one.tree.prompt) for one in examples],
            chat,
            max_new_tokens=config.max_response_tokens,
            temperature=config.temperature,
            generator=torch_stream(config.seed, "sft/samples"),
        )


def different_prompts(examples: Sequence[Example], most: int) -> list[Example]:
    """Return at most `most` examples with different prompts, each the last one of its prompt."""
    return list({one.record.key: one for one in examples}.values())[:most]


def sample_rows(
    examples: Sequence[Example], answers: Sequence[Answer], scores: Sequence[float] | None
) -> list[dict[str, Any]]:
    """Make the rows of samples.jsonl, with the policy's response beside the demonstration."""
    rows: list[dict[str, Any]] = [
        {
            "prompt": example.record.prompt,
            "response": answer.text,
            "demonstration": example.record.response,
            "ended": answer.is_finished,
        }
        for example, answer in zip(examples, answers, strict=True)
    ]
    if scores is not None:
        rows = [{**row, "score": score} for row, score in zip(rows, scores, strict=True)]
    return rows
