"""Run the tests that need a GPU."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu_check.records import Emit, Row, Skipped
from benchmarks.gpu_check.setting import Setting

ROOT = Path(__file__).parents[2]
FOLDER = "tests/device"


def tests(setting: Setting, emit: Emit) -> None:
    """Report the outcome of every test marked gpu.

    Raises:
        Skipped: A package of the tests is missing.
        RuntimeError: A test failed, or pytest did.
    """
    for package in ("pytest", "beartype", "jaxtyping"):
        if importlib.util.find_spec(package) is None:
            raise Skipped(f"{package} is not installed")
    setting.folder.mkdir(parents=True, exist_ok=True)
    report = setting.folder / "tests.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", FOLDER]
    code = subprocess.run([*command, f"--junitxml={report.resolve()}"], cwd=ROOT).returncode
    if report.exists():
        for row in outcomes(report.read_text(encoding="utf-8")):
            emit(row)
    if code:
        raise RuntimeError(f"pytest ended with code {code}")


def outcomes(junit: str) -> Iterator[Row]:
    """Yield a row for each test of a report that pytest wrote with --junitxml."""
    for case in ElementTree.fromstring(junit).iter("testcase"):
        row: Row = {"test": case.get("name"), "outcome": "passed"}
        row["seconds"] = float(case.get("time", 0))
        for kind in ("failure", "error", "skipped"):
            found = case.find(kind)
            if found is not None:
                row |= {"outcome": kind, "note": (found.get("message") or "")[:300]}
        yield row
