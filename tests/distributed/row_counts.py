"""SFT, a reward model and PPO on a handful of rows each, so that processes get uneven shares, none
at all, or nothing but responses that are only their end."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from rlhf.generation.hf import LoopEngine
from rlhf.generation.interface import Decoding, Samples
from rlhf.inputs.files import split_by_prompt, write_records
from rlhf.inputs.records import Demonstration
from rlhf.rewards.settings import RewardSettings
from stages.ppo import config as ppo_config
from stages.ppo import train as ppo_train
from stages.rm import config as rm_config
from stages.rm import train as rm_train
from stages.sft import config as sft_config
from stages.sft import train as sft_train
from tests.distributed.chain import ppo_settings, ranking, rm_settings, sft_settings, write

FEW = (1, 3)
"""Rows to train on, and as many held out, of each stage. With one, a process has none; with three,
one process has two and the other one."""
MORE = (2, 7, 8, 9)


def make_rows(inputs: Path) -> None:
    """A folder inputs/rows/COUNT for each count, with what the three stages read."""
    pool = [Demonstration(prompt=f"q{i}", response="") for i in range(60)]
    sides = split_by_prompt(pool, 0.5, seed=0)
    for count in (*FEW, *MORE):
        folder = inputs / "rows" / str(count)
        folder.mkdir(parents=True)
        # SFT sorts each batch by length: of the two rows of one, the second process gets "".
        chosen = [
            Demonstration(prompt=row.prompt, response="ab" * (i % 2))
            for side in sides
            for i, row in enumerate(side[:count])
        ]
        write_records(folder / "demonstrations.jsonl", chosen)
        write(folder, "rankings", [ranking(i) for i in range(count)])
        write(folder, "held_out", [ranking(i) for i in range(1000, 1000 + count)])
        write(folder, "prompts", [{"prompt": str(2**i)} for i in range(count)])


def sft_of(inputs: Path, count: int, out: Path) -> sft_config.Config:
    changes: dict[str, Any] = {
        "demonstrations": str(inputs / "rows" / str(count) / "demonstrations.jsonl"),
        "held_out": 0.5,
        "batch_size": 2,
        "micro_batch_size": 1,
        "checkpoint_every": None,
        "eval_every": 100,
    }
    return sft_settings(inputs, out, **changes)


def rm_of(inputs: Path, count: int, out: Path) -> rm_config.Config:
    changes: dict[str, Any] = {
        "batch_size": 3,
        "num_epochs": 1,
        "num_demonstrations": count,
        "checkpoint_every": None,
    }
    return rm_settings(inputs / "rows" / str(count), inputs / "base", out, **changes)


def ppo_of(inputs: Path, count: int, out: Path) -> ppo_config.Config:
    rows = inputs / "rows" / str(count) / "prompts.jsonl"
    changes: dict[str, Any] = {
        "prompts": str(rows),
        "prompts_held_out": str(rows),
        "num_eval_prompts": count,
        "reward": RewardSettings(
            function="tests.distributed.row_counts:number_in_prompt", missing_end="none"
        ),
        "rollout": ppo_config.RolloutSettings(batch_size=4, max_new_tokens=6),
        "num_updates": 1,
        "ppo": ppo_config.PPOSettings(mini_batch_size=4),
        "micro_batch_tokens": 16,
        "checkpoint_every": None,
    }
    return ppo_settings(inputs, inputs / "base", Path("unused"), out, **changes)


def number_in_prompt(
    prompts: Sequence[str], responses: Sequence[str], metas: Sequence[dict[str, Any]]
) -> list[float]:
    """Powers of two: their sum tells which rows were counted, and how often."""
    return [float(prompt) for prompt in prompts]


def run_all(inputs: Path, out: Path, counts: Sequence[int]) -> None:
    """All stages on each count; in PPO all responses of the second process end at once."""
    for count in counts:
        sft_train.train(sft_of(inputs, count, out / f"sft{count}"))
        PartialState().wait_for_everyone()  # the first process writes while the others are done
        rm_train.train(rm_of(inputs, count, out / f"rm{count}"))
        PartialState().wait_for_everyone()
        with ending_at_once(PartialState().process_index == 1):
            ppo_train.train(ppo_of(inputs, count, out / f"ppo{count}"))
        PartialState().wait_for_everyone()


@contextmanager
def ending_at_once(are_cut: bool) -> Iterator[None]:
    """Inside, this process's responses are their end token and nothing else."""
    generate = LoopEngine.generate

    def cut(
        engine: LoopEngine, prompts: Sequence[Sequence[int]], decoding: Decoding, *others: Any
    ) -> Samples:
        drawn = generate(engine, prompts, decoding, *others)
        return Samples([[decoding.end_id] for _ in prompts], [row[:1] for row in drawn.logprobs])

    with pytest.MonkeyPatch.context() as patch:
        if are_cut:
            patch.setattr(LoopEngine, "generate", cut)
        yield
