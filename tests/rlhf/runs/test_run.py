"""Tests the run's folder: what it holds, and what it shows of a run that did not finish."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf.runs.run import Run, open_run
from rlhf.training.processes import check_joined


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings for these tests."""

    output_dir: str
    betas: tuple[float, float] = (0.9, 0.95)


def start(folder: Path, stage: str = "sft", **options: Any) -> Run:
    return open_run(Settings(output_dir=str(folder)), stage=stage, **{"inputs": {}, **options})


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def load(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_folder_holds_settings_metrics_samples_results(tmp_path: Path) -> None:
    run = start(tmp_path / "run")
    run.log(1, {"sft/loss": torch.tensor(2.5), "sft/grad_norm": float("nan")})
    run.log(2, {"sft/loss": 2})
    run.samples([{"prompt": "Grüße", "response": "你好"}], step=2)
    run.finish({"accuracy": torch.tensor(0.5), "nested": {"n": [1, 2]}})
    folder = tmp_path / "run"
    assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")) == {
        "output_dir": str(folder),
        "betas": [0.9, 0.95],
    }
    assert rows(folder / "metrics.jsonl") == [
        {"step": 1, "sft/loss": 2.5, "sft/grad_norm": "nan"},
        {"step": 2, "sft/loss": 2},
    ]
    assert rows(folder / "samples.jsonl") == [{"step": 2, "prompt": "Grüße", "response": "你好"}]
    assert "你好" in (folder / "samples.jsonl").read_text(encoding="utf-8")
    results = load(folder / "results.json")
    assert results.pop("seconds") >= 0
    assert results == {"accuracy": 0.5, "nested": {"n": [1, 2]}}


def test_what_the_user_chose_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each path once: an input or the folder is no setting to repeat, and a folder's own figures
    are no second input."""
    folder, data = tmp_path / "run", tmp_path / "data"
    data.mkdir()
    (data / "results.json").touch()
    figures = str(data / "results.json")
    config = Settings(output_dir=str(folder), betas=(0.5, 0.95))
    inputs: dict[str, str | Path] = {"base": "gpt2", "data": data, "figures": figures}
    open_run(config, stage="sft", inputs=inputs)
    assert capsys.readouterr().out.splitlines() == [
        f"sft: settings that are not the defaults (all are in {folder / 'config.yaml'})",
        "  betas: [0.5, 0.95]",
        "sft: reads base from gpt2",
        f"sft: reads data from {data}",
        f"sft: writes {folder}",
    ]
    start(tmp_path / "other", inputs={"figures": figures})
    told = capsys.readouterr().out.splitlines()
    assert told[1:] == [f"sft: reads figures from {figures}", f"sft: writes {tmp_path / 'other'}"]


def test_unfinished_run_does_not_look_complete(tmp_path: Path) -> None:
    start(tmp_path).finish({"accuracy": 1})
    run = start(tmp_path, always_runs=True)
    assert (tmp_path / "results.json").exists()
    run.log(1, {"sft/loss": 1.0})
    assert not (tmp_path / "results.json").exists()
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "sft/loss": 1.0}]


def test_run_that_fails_on_its_inputs_leaves_the_old_one(tmp_path: Path) -> None:
    run = start(tmp_path / "old")
    run.log(1, {"sft/loss": 1.0})
    run.finish({})
    with pytest.raises(FileNotFoundError, match=r"sft reads data from .*absent\.jsonl"):
        start(tmp_path / "old", inputs={"data": tmp_path / "absent.jsonl"})
    start(tmp_path / "old", always_runs=True)
    assert load(tmp_path / "old" / "results.json")
    assert len(rows(tmp_path / "old" / "metrics.jsonl")) == 1


@pytest.mark.parametrize("path", ["runs/tiny/base", "demonstrations.jsonl", "absent/model.gguf"])
def test_absent_input_is_refused(
    tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"sft reads base from {path}"):
        start(tmp_path / "run", inputs={"base": path})
    assert not (tmp_path / "run").exists()


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    with pytest.raises(ValueError, match="is also what policy is read from, and would be written"):
        start(tmp_path / "x" / ".." / "sft", inputs={"policy": str(tmp_path / "sft")})


def test_resumed_run_keeps_rows_up_to_its_step(tmp_path: Path) -> None:
    run = start(tmp_path)
    for step in (1, 2, 3):
        run.log(step, {"ppo/kl": 0.1})
        run.samples([{"response": "a"}], step=step)
    run.samples([{"response": "two\u2028lines\x85more"}], step=2)
    run.samples([{"response": "of the finished model"}])
    with (tmp_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 4, "ppo')
    again = start(tmp_path)
    again.resume(2, seconds=100.0)
    again.log(3, {"ppo/kl": 0.3})
    assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert rows(tmp_path / "metrics.jsonl")[-1]["ppo/kl"] == 0.3
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1, 2, 2]
    again.finish({})
    assert 100 <= load(tmp_path / "results.json")["seconds"] < 200


def test_checkpoints_go_when_a_run_is_finished_or_begins_anew(tmp_path: Path) -> None:
    run = start(tmp_path)
    run.log(1, {"ppo/kl": 0.1})
    (run.checkpoints / "step-1").mkdir(parents=True)
    resumed = start(tmp_path)
    resumed.resume(1, seconds=1.0)
    resumed.log(2, {"ppo/kl": 0.1})
    assert (run.checkpoints / "step-1").exists()
    resumed.finish({})
    assert not run.checkpoints.exists()
    (tmp_path / "metrics.jsonl").unlink()
    again = start(tmp_path)
    assert again.is_finished
    again.log(1, {"ppo/kl": 0.1})
    (run.checkpoints / "step-1").mkdir(parents=True)
    start(tmp_path).log(1, {"ppo/kl": 0.1})
    assert not run.checkpoints.exists()


def test_lineage_hashes_inputs_and_names_what_made_them(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n', encoding="utf-8")
    parent = start(tmp_path / "base", stage="pretrain")
    parent.log(1, {"pretrain/loss": 1.0})
    weights = b"weights"
    (parent.dir / "model.safetensors").write_bytes(weights)
    parent.finish({"loss": 1.5})
    inputs = {"base": tmp_path / "base", "data": data, "rm": "owner/name", "more": "hub:owner/name"}
    start(tmp_path / "sft", inputs=inputs).finish({})
    lineage = load(tmp_path / "sft" / "lineage.json")
    base = lineage["inputs"]["base"]
    assert base["sha256"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}
    assert base["results"]["loss"] == 1.5
    lineage_bytes = (tmp_path / "base" / "lineage.json").read_bytes()
    assert base["lineage_sha256"] == hashlib.sha256(lineage_bytes).hexdigest()
    hash_of_data = hashlib.sha256(data.read_bytes()).hexdigest()
    assert lineage["inputs"]["data"] == {"path": str(data), "sha256": {"data.jsonl": hash_of_data}}
    assert lineage["inputs"]["rm"] == {"hub": "owner/name"}
    assert lineage["inputs"]["more"] == {"hub": "hub:owner/name"}
    assert lineage["versions"]["torch"] == torch.__version__


def test_only_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "RANK", "1")
    run = start(tmp_path / "run")
    run.log(1, {"sft/loss": 1.0})
    run.finish({})
    assert run.dir == tmp_path / "run"
    assert not run.dir.exists()


def test_processes_that_train_alone_are_refused() -> None:
    check_joined(2, 2)
    with pytest.raises(ValueError, match="2 processes were started but only 1"):
        check_joined(1, 2)
