"""Stages that one process starts behave as if `python -m` had started them."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIENT = f"{sys.executable} -S {ROOT / 'stages/stage_client.py'}"

PROGRAM = """
import atexit, os, signal, sys, time
import torch

def end(*_):
    print("asked to end")
    sys.exit(3)

what = sys.argv[1]
if what == "fail":
    sys.exit("error: no")
if what == "crash":
    raise KeyError("ours")
if what == "promise":
    atexit.register(print, "kept")
if what == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if what == "wait":
    signal.signal(signal.SIGTERM, end)
    with open(sys.argv[2], "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
print(__name__, sys.argv[1:], os.environ.get("MINE"), torch.get_num_threads())
"""

Serve = Callable[[str], subprocess.CompletedProcess[str]]


@pytest.fixture
def serve(tmp_path: Path) -> Serve:
    """Run a shell script under a server that imports only the test's program."""
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(script: str) -> subprocess.CompletedProcess[str]:
        start = (
            "import sys; import stages.stage_server as server; server.PROGRAMS = ('torch',); "
            "server.OPTIONAL_MODULES = (); sys.exit(server.main(['bash', '-c', sys.argv[1]]))"
        )
        return subprocess.run(
            [sys.executable, "-c", start, script],
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_a_stage_has_its_words_its_environment_and_its_threads(serve: Serve) -> None:
    ran = serve(f"MINE=yes OMP_NUM_THREADS=2 {CLIENT} program a 'b c'; {CLIENT} program d")
    assert ran.stdout.splitlines() == [
        "python -m program a 'b c'",
        "__main__ ['a', 'b c'] yes 2",
        "python -m program d",
        "__main__ ['d'] None 1",
    ]
    assert ran.returncode == 0


def test_what_is_registered_for_the_end_of_a_stage_is_called(serve: Serve) -> None:
    assert serve(f"{CLIENT} program promise").stdout.splitlines()[-1] == "kept"


def test_exit_codes_are_those_of_the_stage(serve: Serve) -> None:
    ran = serve(f"for how in fail crash die; do {CLIENT} program $how; echo $how $?; done; exit 7")
    assert words_of(ran) == ["fail", "1", "crash", "1", "die", "137"]
    assert "error: no" in ran.stderr
    assert "KeyError: 'ours'" in ran.stderr
    assert ran.returncode == 7


def test_who_asked_may_be_gone_before_the_stage_ends(serve: Serve, tmp_path: Path) -> None:
    waits = tmp_path / "waits"
    ran = serve(
        f"{CLIENT} program wait {waits} & until [ -s {waits} ]; do sleep 0.1; done; kill -9 $!; "
        f"kill $(cat {waits}); {CLIENT} program b"
    )
    assert lines_of(ran) == ["asked to end", "__main__ ['b'] None 1"]
    assert ran.returncode == 0


def test_two_stages_go_side_by_side_and_each_can_be_ended(serve: Serve, tmp_path: Path) -> None:
    waits = tmp_path / "waits"
    ran = serve(
        f"{CLIENT} program wait {waits} & until [ -s {waits} ]; do sleep 0.1; done; "
        f"{CLIENT} program b; kill %1; wait %1; echo $?"
    )
    assert lines_of(ran) == [
        "__main__ ['b'] None 1",
        "asked to end",
        "3",
    ]


def lines_of(ran: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the lines that stages and shell printed, without the commands that clients print."""
    return [line for line in ran.stdout.splitlines() if not line.startswith("python -m ")]


def words_of(ran: subprocess.CompletedProcess[str]) -> list[str]:
    return " ".join(lines_of(ran)).split()
