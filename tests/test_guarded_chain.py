"""On local folders the stages need no network or optional package, and write nothing elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.guarded_chain import HIDDEN

ROOT = Path(__file__).parents[1]
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK")
"""Variables that the tests set, and a user does not."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the chain as a user does, with its own home folder; return what it tried."""
    folder = tmp_path_factory.mktemp("chain").resolve()
    home = folder / "home"
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in OFFLINE}
    for name in ("HF_HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        environment.pop(name, None)
    environment |= {"HOME": str(home), "TMPDIR": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "tests.guarded_chain", str(folder)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in folder.iterdir()) == [
        "base",
        "demonstrations.jsonl",
        "home",
        "prompts.jsonl",
        "runs",
    ]
    results = json.loads((folder / "runs" / "evaluate" / "results.json").read_text())
    assert {"sft", "ppo", "rm"} <= set(results)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_local_folders_need_no_network(report: dict[str, Any]) -> None:
    assert report["calls"] == []


@pytest.mark.slow
def test_stages_write_into_their_runs_only(report: dict[str, Any]) -> None:
    """They do even if settings name things `../../out`."""
    assert report["writes"] == []


@pytest.mark.slow
def test_all_stages_run_without_the_optional_packages(report: dict[str, Any]) -> None:
    assert report["imported"] == report["found"] == []
    assert "deepspeed" in report["asked"] and set(report["asked"]) <= set(HIDDEN)


def test_the_guards_see_what_they_forbid(tmp_path: Path) -> None:
    """Otherwise the tests above could not fail."""
    program = f"""
import json, socket
from pathlib import Path
from tests.guarded_chain import hide_packages, watch
asked = hide_packages()
calls, writes = watch([Path({str(tmp_path / "in")!r})])
for use in (
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: socket.socket().connect(("192.0.2.1", 80)),
    lambda: __import__("wandb"),
    lambda: Path({str(tmp_path / "in" / ".." / "x")!r}).write_text("x"),
    lambda: Path({str(tmp_path / "y")!r}).mkdir(),
    lambda: Path({str(tmp_path / "in" / "z")!r}).write_text("z"),
):
    try:
        use()
    except (OSError, ImportError):
        pass
print(json.dumps([len(calls), writes, sorted(asked)]))
"""
    (tmp_path / "in").mkdir()
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    outside = [str(tmp_path / "x"), str(tmp_path / "y")]
    assert json.loads(done.stdout) == [2, outside, ["wandb"]]
