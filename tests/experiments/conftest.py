"""Writes the run folders that several studies are tested on."""

from pathlib import Path

import pytest

from tests.experiments.run_folders import evaluate_config, ppo_config, write_run


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Write runs of plain PPO with KL coefficient 0.05, and of PPO-ptx with ptx coefficient 1."""
    folder = str(tmp_path / "run")
    write_run(ppo_config(folder), {})
    norms = [(2.0, 4.0), (9.0, 3.0)]  # ratios 0.5 and 3
    logged = [{"ppo/ptx_grad_norm": ptx, "ppo/ppo_grad_norm": ppo} for ptx, ppo in norms]
    write_run(ppo_config(folder, "ppo_ptx", ptx=1.0), {}, [*logged, {"ppo/kl": 0.1}])
    write_run(evaluate_config(folder), {})
    return folder
