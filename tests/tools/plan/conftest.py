"""Fixtures of the plan's tests."""

from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.measuring.allocations import DryRun
from stages.ppo.config import Config
from tests.tools.plan.inputs import run_config, write_inputs


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("plan") / "inputs")


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Config:
    return replace(run_config(tiny, tmp_path / "run"), ema_decay=0.9)


@pytest.fixture
def without_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the dry runs of passes, which take most of a plan's time, and let each need no memory.

    For tests of what is held and loaded."""
    monkeypatch.setattr(DryRun, "_peak", lambda *_, **__: 0)
    monkeypatch.setattr(DryRun, "sampling", lambda *_: (0, 0))
