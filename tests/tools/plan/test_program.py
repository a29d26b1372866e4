"""The program from its command line to its text, and what it refuses."""

from pathlib import Path

import pytest

from rlhf.models.settings import LoraSettings, ModelSettings
from stages.sft.config import Config as SFTConfig
from tools.plan.__main__ import main
from tools.plan.launch import Launch
from tools.plan.make import make_plan

ROOT = Path(__file__).parents[3]


def test_quantized_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    config = SFTConfig(
        output_dir=str(tmp_path),
        model=ModelSettings(path=str(tiny / "sft")),
        demonstrations="unused",
        lora=LoraSettings(rank=2, quantize="4bit"),
    )
    with pytest.raises(ValueError, match=r"lora\.quantize is 4bit, and the plan knows no"):
        make_plan(config, Launch())


@pytest.mark.parametrize("stage", ["ppo", "rm", "sft"])
@pytest.mark.slow
def test_the_program_tells_the_stage_by_its_settings(
    stage: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"ppo": "policy", "rm": "model", "sft": "model"}[stage]
    small = {
        "ppo": ["--generation.batch_size=4", "--rollout.batch_size=32"],
        "rm": [],
        "sft": ["--micro_batch_size=2", "--num_samples=2"],
    }[stage]
    settings = ROOT / f"configs/{stage}/tiny.yaml"
    main(["--config", str(settings), f"--{model}.path", str(tiny / "sft"), *small])
    printed = capsys.readouterr().out
    assert {"ppo": "seconds of an update", "rm": "seconds of a pass of", "sft": "an optimizer"}[
        stage
    ] in printed
    assert printed.count("<- peak") == 1


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["--accelerate", "fsdp1.yaml"], "asks for fsdp_version 1; give 2"),
        (["--accelerate", "broken.yaml"], "error: broken.yaml is not YAML: while"),
        (["--config=broken.yaml"], "error: broken.yaml is not YAML: while"),
    ],
)
def test_files_that_cannot_be_planned_are_named(
    files: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "broken.yaml").write_text("model: [a\n")
    (tmp_path / "fsdp1.yaml").write_text("distributed_type: FSDP\n")
    with pytest.raises(SystemExit) as stopped:
        main(["--config=configs/ppo/tiny.yaml", "--policy.path", str(tiny / "sft"), *files])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_settings_the_plan_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--accelerate" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ROOT / "configs/ppo/tiny.yaml"
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(settings), "--policy.path", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: the model folder ")
