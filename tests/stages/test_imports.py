"""Tests what a stage imports at its start, since users wait for it every time."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.__main__ import GROUPS, programs_of

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "collect", "rm", "ppo", "evaluate")
UNNEEDED = (
    "peft",
    "bitsandbytes",
    "trl",
    "datasets",
    "pandas",
    "matplotlib",
    "deepspeed",
    "lm_eval",
)
"""Packages that are imported when a run needs them. SFT needs TRL, which imports most of them."""


def test_programs_read_their_settings_before_they_import_torch() -> None:
    """A wrong setting is told within half a second; torch and transformers take ten."""
    found_programs = [program.module for group in GROUPS for program in programs_of(group)]
    # This one writes a page from the tables of all stages, for developers.
    modules = [name for name in found_programs if name != "tools.metrics_page"]
    assert {"stages.sft", "data.smollm2", "tools.export"} <= set(modules)
    packages = {name for name in modules if (ROOT / name.replace(".", "/")).is_dir()}
    programs = [f"{name}.__main__" if name in packages else name for name in modules]
    program = f"import sys, {', '.join(programs)}; print({{'torch', 'numpy'}} & set(sys.modules))"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "set()\n"


@pytest.mark.slow
def test_stages_start_without_the_packages_that_few_runs_need() -> None:
    modules = ", ".join(f"stages.{stage}.{_entry(stage)}" for stage in STAGES)
    program = f"import sys, {modules}; print([name for name in {UNNEEDED} if name in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.splitlines()[-1] == "[]"


def _entry(stage: str) -> str:
    """Return the module that the stage's program imports."""
    names = ("train", stage)
    return next(name for name in names if (ROOT / "stages" / stage / f"{name}.py").is_file())
