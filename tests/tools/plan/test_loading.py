"""The host memory that models take while they load, from numbers worked by hand."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf.models.settings import LoraSettings
from stages.ppo.config import Config
from tests.tools.plan.inputs import EMBEDDING, fine_tuning_config, weights_of
from tools.plan.launch import Launch
from tools.plan.make import make_plan
from tools.plan.table import show


def of_other_type(tiny: Path, folder: Path, name: str) -> Path:
    """Write a config of the same policy, with files of this type."""
    settings = json.loads((tiny / "sft/config.json").read_text())
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings | {"dtype": name}))
    return folder


@pytest.mark.usefixtures("without_passes")
@pytest.mark.parametrize("is_fsdp", [True, False])
def test_processes_share_files_of_their_own_type_and_under_fsdp2_converted_ones(
    is_fsdp: bool, tiny: Path, config: Config, tmp_path: Path
) -> None:
    """ZeRO-3 stands for the other launchers."""
    full = weights_of(tiny)
    value = full + 4 * (32 - EMBEDDING)  # a head of one row instead of the unembedding
    stage = 0 if is_fsdp else 3
    launch = Launch(
        4, stage, num_machines=2, mixed_precision="bf16", is_fsdp=is_fsdp, device="cuda"
    )
    # The launcher's bfloat16 for the reference is not the files' float32.
    plan = make_plan(config, launch)
    own, shared = (0, full // 2) if is_fsdp else (full // 2, 0)
    found = plan.loading.most_own, plan.loading.most_shared
    assert found == (own, full + value + shared)
    # Three models once, or the two trained ones once and the reference in each of two processes.
    copies = 1 if is_fsdp else 2
    assert plan.host == {"while models load": full + value + copies * full // 2}
    # Files in bfloat16 are converted for the trained models, which float32 asks for.
    halves = of_other_type(tiny, tmp_path / "halves", "bfloat16")
    policy = replace(config.policy, path=str(halves))
    plan = make_plan(replace(config, policy=policy), launch)
    assert plan.loading.peak(2) == copies * (full + value) + full // 2
    # Offloaded models stay on the host, where files in bfloat16 are the reference's own pages.
    moved = make_plan(replace(config, policy=policy, offload=True), launch)
    assert moved.host["what is offloaded"] == full // 2
    moved = make_plan(replace(config, offload=True), launch)
    assert moved.host["what is offloaded"] == copies * full // 2


@pytest.mark.usefixtures("without_passes")
def test_adapters_over_one_base_load_it_once(tiny: Path, config: Config) -> None:
    config = replace(config, lora=LoraSettings(rank=4))
    assert make_plan(config, Launch(device="cuda")).loading.most_shared == pytest.approx(
        weights_of(tiny), rel=0.1
    )


def test_a_machine_that_is_too_small_is_warned_of(tiny: Path, tmp_path: Path) -> None:
    config = fine_tuning_config(tiny, tmp_path / "run", response_tokens=8)
    plan = make_plan(config, Launch(2))
    assert plan.host["peak of a phase"] == 2 * plan.peak
    enough = show(plan, 1e9, torch.float32, 2 * plan.peak)
    assert "for its 2 processes together" in enough
    assert "warning" not in enough
    assert "warning: this machine has" in show(plan, 1e9, torch.float32, 2 * plan.peak - 1)
