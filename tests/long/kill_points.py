"""Kills runs of all stages at random moments, and compares their results with an undisturbed run.

Every third kill comes while a checkpoint is written. Compared are all bytes of the weights, and all
rows of metrics, samples and results, except times.

    python -m tests.long.kill_points --kill-points 30
    python -m tests.long.kill_points --kill-points 12 --stages ppo
    python -m tests.long.kill_points --kill-points 10 --launchers cpu2_zero2 cpu2_zero3 fsdp2

Takes about ten seconds a kill on one core, and under a launcher half a minute. Under a launcher
there are two processes, and either of them is killed with equal probability.
"""

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.stages.cut_runs import (
    KILLED,
    STAGES,
    Cut,
    make_configs,
    outcome,
    run_command,
    start_command,
    start_server,
    wait_for,
)

WRITING = {
    "save_file": 5,
    "sync_to_disk": 9,
    "_write_json": 2,
    "sha256_of": 6,
    "Path.rename": 1,
}
"""Functions that write a checkpoint, and how often each is called for one at most."""
WRITING_SHARDS = {"save_file": 1, "sync_to_disk": 2, "_write_json": 1, "sha256_of": 2}
"""The same for a process that writes only its shards."""
LAUNCHERS = ("cpu2_zero2", "cpu2_zero3", "fsdp2", "deepspeed_zero2", "deepspeed_zero3_offload")
"""Files in configs/accelerate that split models; those for GPUs run on CPU processes."""


@dataclass(frozen=True)
class Launch:
    """Says how the runs are started."""

    launcher: str | None = None
    num_processes: int = 1

    def run(self, stage: str, config: Any, cut: Cut | None = None) -> tuple[int, str]:
        return run_command(
            stage, config, cut, num_processes=self.num_processes, launcher=self.launcher
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kill-points", type=int, default=30, help="kills of the stages together, each launcher"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument(
        "--launchers", nargs="+", choices=LAUNCHERS, help="two processes; without it there is one"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    launches = [Launch(name, num_processes=2) for name in options.launchers or ()] or [Launch()]
    start_server()  # so that its imports do not count as a run's time
    for launch in launches:
        kill_stages(options.stages, launch, options.kill_points, random.Random(options.seed))
    total = options.kill_points * len(launches)
    print(f"{total} kills, and every run came to what it would have come to")


def kill_stages(
    stages: Sequence[str], launch: Launch, num_kills: int, moments: random.Random
) -> None:
    """Kill runs of the stages, this many times in all."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "inputs").mkdir()
        configs = make_configs(Path(folder) / "inputs", Path(folder))
        for number, stage in enumerate(stages):
            share = (num_kills + number) // len(stages)
            kill_stage(stage, configs[stage], launch, share, moments)


def kill_stage(
    stage: str, config: Any, launch: Launch, num_kills: int, moments: random.Random
) -> None:
    """Kill runs of a stage this many times; each run goes on until it reaches its end."""
    whole = replace(config, output_dir=config.output_dir + "/whole")
    started = time.monotonic()
    code, printed = launch.run(stage, whole)
    seconds = time.monotonic() - started
    assert code == 0, printed
    expected = outcome(Path(whole.output_dir))
    kills, writing, resumed, runs = 0, 0, 0, 0
    while kills < num_kills:
        run = replace(config, output_dir=f"{config.output_dir}/{runs}")
        runs += 1
        for _ in range(moments.randint(1, num_kills - kills)):
            in_writing = kills % 3 == 2
            if in_writing:
                was_killed = kill_in_writing(stage, run, launch, moments)
            else:
                was_killed = kill_after(stage, run, launch, moments.uniform(0, seconds), moments)
            if not was_killed:
                break
            kills += 1
            writing += in_writing
            resumed += any(Path(run.output_dir).glob("checkpoints/step-*"))
        else:
            code, printed = launch.run(stage, run)
            assert code == 0, printed
        found = outcome(Path(run.output_dir))
        for name in expected.keys() | found.keys():
            if found.get(name) != expected.get(name):
                sys.exit(f"{stage}: {name} of {run.output_dir} differs after {kills} kills")
    print(
        f"{launch.launcher or 'one process'}, {stage}: a run of {seconds:.0f} s, {kills} kills in "
        f"{runs} runs, {writing} of them within the writing of a checkpoint, {resumed} with one to "
        f"go on from: "
        f"{', '.join(sorted(expected))} equal",
        flush=True,
    )


def kill_in_writing(stage: str, config: Any, launch: Launch, moments: random.Random) -> bool:
    """Kill a run while it writes a checkpoint; return whether it was killed before its end."""
    rank = moments.randrange(launch.num_processes)
    writing = WRITING if rank == 0 else WRITING_SHARDS
    name = moments.choice(sorted(writing))
    call = moments.randint(1, writing[name])
    cut = Cut("rlhf.runs.checkpoint_files", name, call, rank=rank)
    code, printed = launch.run(stage, config, cut)
    assert code in (0, KILLED), printed
    return code == KILLED


def kill_after(
    stage: str, config: Any, launch: Launch, seconds: float, moments: random.Random
) -> bool:
    """Kill a run after some seconds; return whether it was killed before its end."""
    processes, log = start_command(
        stage, config, num_processes=launch.num_processes, launcher=launch.launcher
    )
    code = wait_for(processes, seconds, moments.randrange(launch.num_processes))
    assert code in (0, KILLED), log.read_text()
    return code == KILLED


if __name__ == "__main__":
    main()
