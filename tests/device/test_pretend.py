"""The stages keep the rules of a device that is not the CPU, on a machine that has only a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.device import pretend

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not pretend.IS_SUPPORTED, reason="this torch registers no device from Python")
def test_every_stage_on_the_pretend_device() -> None:
    """The stages run in another process, because a registered device stays registered."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/device/on_pretend.py",
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-3000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
