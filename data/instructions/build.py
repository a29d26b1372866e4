"""Write the prompts with instructions."""

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.convert.formats import CONVERTERS
from data.convert.program import Counts, convert_rows
from data.convert.readers import read_source
from data.instructions.ifeval import known_prompts
from data.instructions.templates import NUM_GROUPS, draw_instructions, in_words
from data.record_files import write_record_files
from rlhf.inputs.files import split_by_prompt
from rlhf.inputs.ranges import PositiveInt, ShareBetween
from rlhf.inputs.records import Prompt, Record
from rlhf.inputs.streams import python_stream
from rlhf.runs.settings import FolderSettings

OPEN_ASSISTANT = (
    "open_assistant/en_100_text.jsonl",
    "open_assistant/prompt_lottery_en_250_text.jsonl",
)
IFEVAL = "ifeval/input_data.jsonl"
FILES = ("prompts.jsonl", "prompts_held_out.jsonl", "ifeval.jsonl")


@dataclass(frozen=True, kw_only=True)
class InstructionsConfig(FolderSettings):
    """Write prompts whose instructions a program can check (see docs/rewards.md).

    prompts.jsonl and prompts_held_out.jsonl hold public prompts with random instructions. No public
    prompt is in both. ifeval.jsonl holds those of IFEval's prompts that the checks know.
    """

    output_dir: str
    """Folder to write."""
    shared: str = "../shared/data"
    """Folder of the public files that docs/public_data.md lists."""
    num_variants: PositiveInt = 3
    """How often to use each public prompt, each time with other instructions."""
    num_instructions: int = 2
    """Instructions in a prompt."""
    max_characters: PositiveInt = 240
    """Most characters of a public prompt. Longer ones are left out."""
    held_out: ShareBetween = 0.2
    """Share of the public prompts to hold out."""
    seed: int = 0
    """Seed of the split and of the instructions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.num_instructions <= NUM_GROUPS:
            raise ValueError(
                f"num_instructions is {self.num_instructions}; give 1 to {NUM_GROUPS}, since more "
                "would contradict each other"
            )


def build(config: InstructionsConfig) -> None:
    """Write the prompts; each file appears only when it is whole, and results.json comes last."""
    write_record_files(
        config,
        Path(config.output_dir),
        partial(make_files, config),
        program="data.instructions",
        names=FILES,
        sources={"shared": Path(config.shared)},
        inputs={path: Path(config.shared, path) for path in (*OPEN_ASSISTANT, IFEVAL)},
        describe=lambda prompts: f"{len(prompts)} prompts, {_kinds(prompts)}",
    )


def make_files(config: InstructionsConfig) -> dict[str, list[Prompt]]:
    """Return the prompts of each file by its name."""
    public = [prompt for path in OPEN_ASSISTANT for prompt in _read(config, "strings", path)]
    short = [prompt for prompt in public if _num_characters(prompt) <= config.max_characters]
    train, held_out = split_by_prompt(short, config.held_out, config.seed, salt="instructions")
    rng = python_stream(config.seed, "instructions")
    prompts = (
        with_instructions(train, config, rng),
        with_instructions(held_out, config, rng),
        list(known_prompts(_read(config, "ifeval", IFEVAL))),
    )
    return dict(zip(FILES, prompts, strict=True))


def with_instructions(
    prompts: Sequence[Prompt], config: InstructionsConfig, rng: random.Random
) -> list[Prompt]:
    """Repeat every prompt num_variants times, each time with new instructions."""
    made = {}
    for prompt in prompts:
        assert isinstance(prompt.prompt, str)
        for _ in range(config.num_variants):
            instructions = draw_instructions(rng, config.num_instructions)
            one = Prompt(in_words(prompt.prompt, instructions), {"instructions": instructions})
            made[one.key] = one  # two equal draws give one prompt
    return list(made.values())


def _read(config: InstructionsConfig, layout: str, path: str) -> Iterator[Prompt]:
    file = str(Path(config.shared) / path)
    for record in convert_rows(read_source(file), CONVERTERS[layout]["prompt"], Counts()):
        assert isinstance(record, Prompt)
        yield record


def _num_characters(prompt: Prompt) -> int:
    assert isinstance(prompt.prompt, str)
    return len(prompt.prompt)


def _kinds(prompts: Sequence[Record]) -> str:
    metas = [prompt.meta for prompt in prompts if isinstance(prompt, Prompt)]
    counts = Counter(one["kind"] for meta in metas for one in meta["instructions"])
    return ", ".join(f"{kind} {count}" for kind, count in counts.most_common())
