"""Pretrain, collect and evaluate, on the rows of the other tests."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from rlhf.inputs.records import PromptLike
from rlhf.models.settings import ModelSettings
from stages.collect.collect import collect
from stages.collect.config import Config as CollectConfig
from stages.evaluate.config import Config as EvaluateConfig
from stages.evaluate.evaluate import evaluate
from stages.pretrain.config import ArchitectureSettings
from stages.pretrain.config import Config as PretrainConfig
from stages.pretrain.train import pretrain
from tests.distributed.chain import OPTIM

NUM_PROMPTS = 3
NUM_RESPONSES = 3
"""Odd as the prompts, so that one process has one sample more."""


@dataclass(frozen=True)
class ByLength:
    """Prefers long responses."""

    name: str = "wordy"

    def rank(
        self, prompt: PromptLike, responses: Sequence[str], generator: random.Random
    ) -> list[int | None]:
        longest = sorted(map(len, responses), reverse=True)
        return [1 + longest.index(len(response)) for response in responses]


def make_labelers(path: str) -> list[ByLength]:
    return [ByLength()]


def pretrain_settings(inputs: Path, out: Path) -> PretrainConfig:
    text = str(inputs / "text.jsonl")
    return PretrainConfig(
        text_path=text,
        text_held_out_path=text,
        output_dir=str(out),
        vocab_size=300,
        block_length=16,
        batch_size=4,
        num_epochs=1,
        architecture=ArchitectureSettings(
            hidden_size=32, num_hidden_layers=1, intermediate_size=48, max_position_embeddings=64
        ),
        optim=OPTIM,
        checkpoint_every=None,
    )


def collect_settings(inputs: Path, out: Path) -> CollectConfig:
    return CollectConfig(
        model=ModelSettings(path=str(inputs / "base")),
        prompts=str(inputs / "prompts.jsonl"),
        num_prompts=NUM_PROMPTS,
        labelers="tests.distributed.other_stages:make_labelers",
        labelers_path=str(inputs),
        overlap=0.0,
        num_responses_min=NUM_RESPONSES,
        num_responses_max=NUM_RESPONSES,
        max_new_tokens=4,
        output_dir=str(out),
    )


def evaluate_settings(inputs: Path, out: Path) -> EvaluateConfig:
    return EvaluateConfig(
        policies={"base": str(inputs / "base")},
        prompts=str(inputs / "prompts.jsonl"),
        num_prompts=NUM_PROMPTS,
        max_new_tokens=4,
        held_out_text=str(inputs / "text.jsonl"),
        output_dir=str(out),
    )


def run_others(inputs: Path, out: Path) -> None:
    pretrain(pretrain_settings(inputs, out / "pretrain"))
    PartialState().wait_for_everyone()
    collect(collect_settings(inputs, out / "collect"))
    PartialState().wait_for_everyone()
    evaluate(evaluate_settings(inputs, out / "evaluate"))
    PartialState().wait_for_everyone()
