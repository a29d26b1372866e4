"""If memory really runs out, one line says so and names the setting to lower."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.runs.program import USER_ERROR, run_stage
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training.out_of_memory import REMEDIES, OutOfMemoryError, memory_of
from stages.evaluate.config import Config

ROOT = Path(__file__).parents[3]

RUN_OUT = """
import resource, sys
import torch
from rlhf.runs.program import run_stage
from rlhf.runs.stopwatch import Stopwatch
from stages.evaluate.config import Config

def stage(config):
    resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
    with Stopwatch().phase("train"):
        {allocation}

run_stage(stage, Config, ["--output_dir", "out", "--prompts", "none", "--policies", "{{a: b}}"])
"""


@pytest.mark.parametrize(
    "allocation", ["torch.empty(2**40, dtype=torch.uint8)", "bytearray(2**40)"]
)
@pytest.mark.slow
def test_memory_that_runs_out_ends_a_program_with_one_line(allocation: str) -> None:
    program = RUN_OUT.format(allocation=allocation)
    stopped = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert stopped.returncode == USER_ERROR
    message = stopped.stderr.strip().splitlines()[-1]
    assert message.startswith("error: out of memory in phase train (")
    assert "lower micro_batch_tokens, then set gradient_checkpointing" in message
    assert "Traceback" not in stopped.stderr


def test_a_gpu_that_runs_out_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    def stage(config: Config) -> None:
        with Stopwatch().phase("evaluate"), Stopwatch().phase("rollout"):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\n 2.00 GiB.")

    words = ["--output_dir", "out", "--prompts", "none", "--policies", "{a: b}"]
    with pytest.raises(SystemExit) as stopped:
        run_stage(stage, Config, words)
    assert stopped.value.code == USER_ERROR
    assert capsys.readouterr().err == (
        "error: out of memory in phase rollout (CUDA out of memory. Tried to allocate 2.00 GiB.); "
        f"lower {REMEDIES['rollout']}. `python -m tools.plan` with the same settings shows what "
        "every phase needs\n"
    )


def test_outside_of_phases_there_is_still_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def stage(config: Config) -> None:
        raise MemoryError

    with pytest.raises(SystemExit):
        run_stage(stage, Config, ["--output_dir", "o", "--prompts", "p", "--policies", "{a: b}"])
    assert capsys.readouterr().err.startswith("error: out of memory (MemoryError); lower ")


def test_other_errors_keep_their_kind() -> None:
    with pytest.raises(RuntimeError, match="shapes") as raised, memory_of("train"):
        raise RuntimeError("shapes do not fit")
    assert not isinstance(raised.value, OutOfMemoryError)
