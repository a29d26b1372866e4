"""Runs the three stages under a launcher file in bfloat16, as a user starts them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments.shared import read_rows
from rlhf.inputs.packing import PromptTree
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.passes import compute_logprobs, compute_scores
from rlhf.models.settings import ModelSettings

ROOT = Path(__file__).parents[2]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TREES = [PromptTree((5, 6, 7), ((8, 9, 1), (10, 1)))]


@pytest.mark.parametrize(
    ("launcher", "device"),
    [
        pytest.param("cpu", "cpu", marks=pytest.mark.long),
        pytest.param("gpu", "cuda", marks=[pytest.mark.gpu, NEEDS_GPU]),
    ],
)
def test_the_chain_ends_by_itself_and_its_folders_load_on_the_cpu(
    launcher: str, device: str, tmp_path: Path
) -> None:
    settings = (ROOT / f"configs/accelerate/{launcher}.yaml").read_text(encoding="utf-8")
    file = tmp_path / "launcher.yaml"
    file.write_text(settings.replace('mixed_precision: "no"', "mixed_precision: bf16"))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    done = subprocess.run(
        [*command, "-m", "tests.device.chain", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == [device, "bf16"]
    assert len(read_rows(tmp_path / "ppo/metrics.jsonl")) == 3  # num_updates
    for name in ("sft", "ppo"):
        policy = load_policy(ModelSettings(path=str(tmp_path / name)))
        assert compute_logprobs(policy, TREES, packer_for(policy, 64)).isfinite().all()
    reward = load_scalar(ModelSettings(path=str(tmp_path / "rm")))
    assert compute_scores(reward, TREES, packer_for(reward.classifier, 64)).isfinite().all()
