"""Prepare Anthropic's harmless comparisons for the preset harmless.

    python -m data.instructions --output_dir runs/harmless/instructions
    python -m data.harmless --output_dir runs/harmless/data

One half of the pairs trains the reward model, the other half trains the judge. No stage of the
policy sees the judge's half or the held-out pairs. Many dialogues of the public file share their
first turn, so the split is by the first turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data.convert.formats import CONVERTERS
from data.convert.program import Counts, convert_rows
from data.convert.readers import read_source
from data.instructions import build as instructions
from data.record_files import write_record_files
from rlhf.inputs.files import read_records, split_by_prompt
from rlhf.inputs.ranges import ShareBetween
from rlhf.inputs.records import Demonstration, Prompt, Ranking, Record
from rlhf.runs.program import run_stage
from rlhf.runs.settings import FolderSettings

PAIRS = "hh_rlhf/harmless-base.test.jsonl.gz"
DEMONSTRATIONS = {
    "self_instruct": "self_instruct/seed_tasks.jsonl",
    "alpaca": "alpaca_en_demo/alpaca_en_demo.json",
}
"""Maps the layout of a public file of demonstrations to its path."""
TRAIN_PROMPTS, HELD_OUT_PROMPTS, _ = instructions.FILES
FILES = (
    "rankings.jsonl",
    "rankings_judge.jsonl",
    "rankings_held_out.jsonl",
    "demonstrations.jsonl",
    "prompts.jsonl",
    "prompts_held_out.jsonl",
)


@dataclass(frozen=True, kw_only=True)
class HarmlessConfig(FolderSettings):
    """Write the pairs of the reward model, those of the judge, the held-out pairs, and what SFT and
    PPO train on."""

    output_dir: str
    """Folder to write."""
    instructions: str = "runs/harmless/instructions"
    """Folder that data.instructions wrote. PPO trains on its prompts too."""
    shared: str = "../shared/data"
    """Folder of the public files that docs/public_data.md lists."""
    held_out: ShareBetween = 0.2
    """Share of the first turns to hold out of all training."""
    judge: ShareBetween = 0.5
    """Share of the other first turns whose pairs train the judge."""
    seed: int = 0
    """Seed of the two splits."""


def build(config: HarmlessConfig) -> None:
    """Write the files; each appears only when it is whole, and results.json comes last."""
    write_record_files(
        config,
        Path(config.output_dir),
        partial(make_files, config),
        program="data.harmless",
        names=FILES,
        sources={"shared": Path(config.shared), "instructions": Path(config.instructions)},
        inputs={
            **{path: Path(config.shared, path) for path in (PAIRS, *DEMONSTRATIONS.values())},
            TRAIN_PROMPTS: Path(config.instructions, TRAIN_PROMPTS),
        },
    )


def make_files(config: HarmlessConfig) -> dict[str, Sequence[Record]]:
    """Return the records of each file by its name."""
    pairs = [one for one in _read(config, "hh", "ranking", PAIRS) if isinstance(one, Ranking)]
    train, held_out = split_by_first_turn(pairs, config.held_out, config.seed, salt="harmless")
    policy, judge = split_by_first_turn(train, config.judge, config.seed, salt="judge")
    written = [
        one
        for layout, path in DEMONSTRATIONS.items()
        for one in _read(config, layout, "demonstration", path)
    ]
    with_rules = list(read_records(Path(config.instructions, TRAIN_PROMPTS), Prompt))
    return dict(
        zip(
            FILES,
            (
                policy,
                judge,
                held_out,
                [*map(preferred, policy), *written],
                [*prompts_of(policy), *with_rules],
                prompts_of(held_out),
            ),
            strict=True,
        )
    )


def split_by_first_turn(
    pairs: Sequence[Ranking], share: float, seed: int, *, salt: str
) -> tuple[list[Ranking], list[Ranking]]:
    """Split pairs into (train, held out) so that no first turn of a dialogue is on both sides."""
    openings = {first_turn(pair): Prompt(first_turn(pair)) for pair in pairs}
    _, held_out = split_by_prompt(list(openings.values()), share, seed, salt=salt)
    apart = {opening.prompt for opening in held_out}
    return (
        [pair for pair in pairs if first_turn(pair) not in apart],
        [pair for pair in pairs if first_turn(pair) in apart],
    )


def first_turn(pair: Ranking) -> str:
    """Return the user's first message."""
    return pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0]["content"]


def preferred(pair: Ranking) -> Demonstration:
    """Return the response that people preferred, as a demonstration."""
    assert pair.ranks is not None  # the public file orders every pair
    return Demonstration(
        pair.prompt,
        pair.responses[pair.ranks.index(min(rank for rank in pair.ranks if rank is not None))],
    )


def prompts_of(pairs: Sequence[Ranking]) -> list[Prompt]:
    """Return each prompt of the pairs once."""
    return list({pair.key: Prompt(pair.prompt) for pair in pairs}.values())


def _read(config: HarmlessConfig, layout: str, kind: str, path: str) -> list[Record]:
    file = str(Path(config.shared, path))
    return list(convert_rows(read_source(file), CONVERTERS[layout][kind], Counts()))


if __name__ == "__main__":
    run_stage(build, HarmlessConfig)
