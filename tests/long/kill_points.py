"""Kills runs of all stages at random moments, every third time within the writing of a checkpoint,
and compares what they leave in the end with what an undisturbed run leaves: all bytes of the
weights, and all rows of metrics, samples and results but for the times in them.

    python -m tests.long.kill_points --kill-points 30
    python -m tests.long.kill_points --kill-points 12 --stages ppo

Takes about ten seconds a kill on one core.
"""

import argparse
import random
import sys
import tempfile
import time
from dataclasses import replace
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
)

WRITING = {
    "save_file": 5,
    "sync_to_disk": 9,
    "_write_json": 2,
    "sha256_of": 6,
    "Path.rename": 1,
}
"""Functions that a checkpoint is written with, and how often each is called for one at most."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kill-points", type=int, default=30, help="kills of the stages together")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    start_server()  # its imports are no part of a run's time
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "inputs").mkdir()
        configs = make_configs(Path(folder) / "inputs", Path(folder))
        for number, stage in enumerate(options.stages):
            share = (options.kill_points + number) // len(options.stages)
            kill_stage(stage, configs[stage], share, moments)
    print(f"{options.kill_points} kills, and every run came to what it would have come to")


def kill_stage(stage: str, config: Any, num_kills: int, moments: random.Random) -> None:
    """Kill runs of a stage so many times, each run until it gets to its end."""
    whole = replace(config, output_dir=config.output_dir + "/whole")
    started = time.monotonic()
    code, printed = run_command(stage, whole)
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
                was_killed = kill_in_writing(stage, run, moments)
            else:
                was_killed = kill_after(stage, run, moments.uniform(0, seconds))
            if not was_killed:
                break
            kills += 1
            writing += in_writing
            resumed += any(Path(run.output_dir).glob("checkpoints/step-*"))
        else:
            code, printed = run_command(stage, run)
            assert code == 0, printed
        found = outcome(Path(run.output_dir))
        for name in expected.keys() | found.keys():
            if found.get(name) != expected.get(name):
                sys.exit(f"{stage}: {name} of {run.output_dir} differs after {kills} kills")
    print(
        f"{stage}: a run of {seconds:.0f} s, {kills} kills in {runs} runs, {writing} of them "
        f"within the writing of a checkpoint, {resumed} with one to go on from: "
        f"{', '.join(sorted(expected))} equal",
        flush=True,
    )


def kill_in_writing(stage: str, config: Any, moments: random.Random) -> bool:
    """Whether it came to the kill before its end."""
    name = moments.choice(sorted(WRITING))
    call = moments.randint(1, WRITING[name])
    code, printed = run_command(stage, config, Cut("rlhf.runs.checkpoint_files", name, call))
    assert code in (0, KILLED), printed
    return code == KILLED


def kill_after(stage: str, config: Any, seconds: float) -> bool:
    """The same, by the clock."""
    (process,), log = start_command(stage, config)
    process.join(seconds)
    process.kill()
    process.join()
    assert process.exitcode in (0, KILLED), log.read_text()
    return process.exitcode == KILLED


if __name__ == "__main__":
    main()
