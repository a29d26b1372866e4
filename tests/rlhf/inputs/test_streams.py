"""Random streams are equal for equal names and seeds, otherwise different, and never shared."""

import ast
from collections import Counter
from pathlib import Path

import pytest
import torch

from rlhf.inputs.streams import python_stream, torch_stream

ROOT = Path(__file__).parents[3]
SOURCES = [
    path
    for folder in ("rlhf", "stages", "data", "tools", "experiments")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
STARTS = {"manual_seed", "Random", "default_rng"}
MAY_START = {
    "rlhf/inputs/streams.py",
    # These pass on a seed that their caller gave them.
    "rlhf/generation/hf.py",
    "rlhf/generation/vllm.py",
    "rlhf/measuring/statistics.py",
    # lm-evaluation-harness draws from torch's own generator, which gets the seed of a stream.
    "stages/benchmark/answers.py",
}


def test_a_stream_is_the_same_again() -> None:
    first = torch.rand(8, generator=torch_stream(3, "ppo/rollouts", 1))
    assert torch.equal(first, torch.rand(8, generator=torch_stream(3, "ppo/rollouts", 1)))
    assert python_stream(3, "sft/order").random() == python_stream(3, "sft/order").random()


@pytest.mark.parametrize("other", [(4, "ppo/text", 0), (3, "ppo/prompts", 0), (3, "ppo/text", 1)])
def test_another_seed_name_or_process_is_another_stream(other: tuple[int, str, int]) -> None:
    ours = torch.randperm(50, generator=torch_stream(3, "ppo/text"))
    assert not torch.equal(ours, torch.randperm(50, generator=torch_stream(*other)))


def test_the_text_of_one_seed_is_not_the_prompts_of_the_next() -> None:
    """They would be equal if the text took seed + 1."""
    text = torch.randperm(50, generator=torch_stream(0, "ppo/text"))
    assert not torch.equal(text, torch.randperm(50, generator=torch_stream(1, "ppo/prompts")))


def test_no_program_starts_a_generator_by_itself() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in SOURCES
        if str(path.relative_to(ROOT)) not in MAY_START
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and getattr(node.func, "attr", None) in STARTS
    }
    assert not found, f"take a stream of rlhf/inputs/streams.py instead: {sorted(found)}"


def test_no_two_uses_share_a_name() -> None:
    names = Counter(
        ast.unparse(node.args[1])
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) in {"python_stream", "torch_stream"}
    )
    assert len(names) > 15
    # evaluate draws its answers and its pairs through one function, which is given the name.
    assert {name for name, count in names.items() if count > 1} == set()
