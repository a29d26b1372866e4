"""Every program leaves other files alone, and refuses before it writes anything."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.convert.program import ConvertConfig, convert
from data.instructions.build import InstructionsConfig
from data.instructions.build import build as build_instructions
from data.smollm2.config import Smollm2Config
from data.smollm2.prepare import prepare
from data.tinyworld.build import build as build_tinyworld
from data.tinyworld.config import TinyWorldConfig
from rlhf.runs.folder import LOCK, MARK
from rlhf.runs.program import USER_ERROR, run_stage
from rlhf.runs.settings import settings_in_use
from stages.collect.collect import collect
from stages.collect.config import Config as CollectConfig
from stages.evaluate.config import Config as EvaluateConfig
from stages.evaluate.evaluate import evaluate
from stages.ppo.config import Config as PPOConfig
from stages.ppo.train import train as train_ppo
from stages.pretrain.config import Config as PretrainConfig
from stages.pretrain.train import pretrain
from stages.rm.config import Config as RewardModelConfig
from stages.rm.train import train as train_rm
from stages.sft.config import Config as SFTConfig
from stages.sft.train import train as train_sft
from tests.rlhf.runs.test_folder import snapshot
from tests.stages.cut_runs import make_configs
from tools.export.config import Config as ExportConfig
from tools.export.export import export

STAGES: dict[str, tuple[Callable[[Any], object], type]] = {
    "pretrain": (pretrain, PretrainConfig),
    "sft": (train_sft, SFTConfig),
    "collect": (collect, CollectConfig),
    "rm": (train_rm, RewardModelConfig),
    "ppo": (train_ppo, PPOConfig),
    "evaluate": (evaluate, EvaluateConfig),
    "export": (export, ExportConfig),
    "tinyworld": (build_tinyworld, TinyWorldConfig),
    "instructions": (build_instructions, InstructionsConfig),
    "smollm2": (prepare, Smollm2Config),
}
INPUTS = {
    "pretrain": "--text_path DATA --text_held_out_path DATA",
    "sft": "--model.path MODEL --demonstrations DATA",
    "collect": "--model.path MODEL --prompts DATA --labelers a:b --labelers_path DATA",
    "rm": "--model.path MODEL --rankings [DATA] --demonstrations DATA --held_out 0.1",
    "ppo": "--policy.path MODEL --prompts DATA --reward.model MODEL --ptx.coef 0",
    "evaluate": "--policies.a MODEL --prompts DATA",
    "export": "--folder MODEL",
    "tinyworld": "",
    "instructions": "--shared FOLDER",
    "smollm2": "--shared FOLDER",
}


def words_of(stage: str, data: Path, model: Path) -> list[str]:
    text = INPUTS[stage].replace("DATA", str(data)).replace("MODEL", str(model))
    return text.replace("FOLDER", str(data.parent)).split()


def error_of(stage: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line with which a program refuses."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_stage(*STAGES[stage], words)
    message = capsys.readouterr().err.strip()
    assert stopped.value.code == USER_ERROR, message
    assert message.startswith("error: ") and "Traceback" not in message
    return message


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Write a user's folder whose files have the names of a run's files."""
    folder = tmp_path / "mine"
    (folder / "checkpoints" / "base").mkdir(parents=True)
    for name in ("samples.jsonl", "config.yaml", "results.json", "checkpoints/base/config.json"):
        (folder / name).write_text('{"mine": true}')
    return folder


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("stage", STAGES)
def test_inputs_in_the_folder_to_write_are_refused(
    stage: str, overwrite: list[str], mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_of(stage, mine / "samples.jsonl", mine / "checkpoints" / "base")
    before = snapshot(mine.parent)
    error = error_of(stage, [*words, "--output_dir", str(mine), *overwrite], capsys)
    assert f"output_dir {mine}" in error
    assert snapshot(mine.parent) == before


@pytest.mark.parametrize("stage", STAGES)
def test_files_of_others_in_the_way_are_refused(
    stage: str, mine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in" / "model").mkdir(parents=True)
    (tmp_path / "in" / "x.jsonl").write_text("{}")
    words = words_of(stage, tmp_path / "in" / "x.jsonl", tmp_path / "in" / "model")
    before = snapshot(tmp_path)
    error = error_of(stage, [*words, "--output_dir", str(mine), "--overwrite"], capsys)
    assert "config.yaml" in error and "which this program did not write" in error
    assert snapshot(tmp_path) == before


def test_the_model_of_somebody_else_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("mine")
    words = f"--gguf {tmp_path / 'x.gguf'} --base_dir {tmp_path / 'base'} --overwrite".split()
    before = snapshot(tmp_path)
    assert "holds config.json, which this program" in error_of("smollm2", words, capsys)
    assert snapshot(tmp_path) == before


def test_a_converted_file_is_replaced_on_request_only(tmp_path: Path) -> None:
    source, output = tmp_path / "in" / "x.jsonl", tmp_path / "out.jsonl"
    source.parent.mkdir()
    source.write_text('"a"\n')
    output.write_text("mine")
    config = ConvertConfig(format="strings", input=str(source), output=str(output))
    with pytest.raises(ValueError, match=r"out\.jsonl is there already; give another .*--overw"):
        convert(config)
    assert output.read_text() == "mine"
    convert(replace(config, overwrite=True))
    assert json.loads(output.read_text()) == {"prompt": "a"}
    into = replace(config, overwrite=True, input=str(source.parent), output=str(source))
    with pytest.raises(ValueError, match="is there and is read from input"):
        convert(into)
    assert source.read_text() == '"a"\n'


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "ppo"])
def test_a_finished_run_is_replaced_on_request_only(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "inputs").mkdir()
    config = make_configs(tmp_path / "inputs", tmp_path)[stage]
    folder = Path(config.output_dir)
    function, _ = STAGES[stage]
    function(config)
    files = sorted(path.name for path in folder.iterdir() if path.name != MARK)
    assert json.loads((folder / MARK).read_text())["files"] == files, "all are known as its own"
    (folder / "notes.txt").write_text("mine")
    before = snapshot(folder)
    with pytest.raises(ValueError, match="finished run of other settings: seed was 0 and is 5; g"):
        function(replace(config, seed=5))
    prompts = next((tmp_path / "inputs").glob(f"{INPUT_OF[stage]}.jsonl"))
    prompts.write_text(prompts.read_text() * 2)
    with pytest.raises(ValueError, match=r"what .* names was other data"):
        function(config)
    assert snapshot(folder) == before
    if stage != "pretrain":  # the fastest stage
        return
    function(replace(config, seed=5, overwrite=True))
    assert (folder / "notes.txt").read_text() == "mine" and not (folder / LOCK).exists()
    assert snapshot(folder)["model.safetensors"] != before["model.safetensors"]


INPUT_OF = {"pretrain": "text", "sft": "demonstrations", "rm": "rankings", "ppo": "prompts"}


def test_the_tiny_world_of_another_seed_is_replaced_on_request_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [f"--num_{name}=9" for name in ("texts", "texts_held_out", "demonstrations")]
    sizes += [f"--num_prompts_{name}=9" for name in ("rm", "ppo", "held_out")]
    words = ["--output_dir", str(tmp_path / "data"), *sizes]
    run_stage(*STAGES["tinyworld"], words)
    (tmp_path / "data" / "mine.jsonl").write_text("mine")
    before = snapshot(tmp_path)
    assert "seed was 0 and is 1" in error_of("tinyworld", [*words, "--seed", "1"], capsys)
    assert snapshot(tmp_path) == before
    run_stage(*STAGES["tinyworld"], [*words, "--seed", "1", "--overwrite"])
    after = snapshot(tmp_path)
    assert (
        after["data/mine.jsonl"] == b"mine"
        and after["data/world.json"] != before["data/world.json"]
    )


def test_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "inputs").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("rlhf.runs.run.commit", lambda: "abc")
    config = make_configs(home / "inputs", tmp_path)["pretrain"]
    settings = settings_in_use(config) | {"output_dir": "~/runs/base/"}
    settings |= dict.fromkeys(("text_path", "text_held_out_path"), "~/inputs/text.jsonl")
    (home / "settings.yaml").write_text(json.dumps(settings))
    run_stage(*STAGES["pretrain"], ["--config=~/settings.yaml"])
    assert (home / "runs" / "base" / "results.json").is_file()
    assert list((tmp_path / "here").iterdir()) == []
