"""A run that is killed at any moment and started again gives the same bits as one that is not."""

import functools
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.models.settings import LoraSettings
from rlhf.runs.program import INTERRUPTED
from tests.stages.cut_runs import KILLED, Cut, make_configs, outcome, run_command, run_to_the_end


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    (folder / "inputs").mkdir()
    return make_configs(folder / "inputs", folder)


@pytest.fixture(scope="module")
def whole(configs: dict[str, Any]) -> Callable[[str], dict[str, Any]]:
    """Return a function from a stage to the outcome of its run that nothing cuts."""

    @functools.cache
    def outcome_of(stage: str) -> dict[str, Any]:
        run_to_the_end(stage, configs[stage], [])
        return outcome(Path(configs[stage].output_dir))

    return outcome_of


PPO_CUTS = [
    Cut("stages.ppo.update", "policy_loss", 5),  # before the first checkpoint
    Cut("rlhf.runs.checkpoint_files", "save_file", 2),  # while the first is written
    Cut("stages.ppo.train", "update", 3),  # after the first
    Cut("rlhf.runs.checkpoint_files", "Path.rename", 1),  # the second is whole, but not renamed
    Cut("rlhf.runs.checkpoints", "remove_others", 1),  # it is renamed, and the first is still there
    Cut("stages.ppo.stopping", "save_policy", 1),
]


def test_ppo_killed_again_and_again_is_the_run_that_was_not(
    configs: dict[str, Any], whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    config = replace(configs["ppo"], output_dir=str(tmp_path / "killed"))
    rows = same_when_killed("ppo", config, PPO_CUTS, whole("ppo"))
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[-1]["ppo/kl"] > 0 and rows[-1]["ppo/kl_coef"] != rows[0]["ppo/kl_coef"]


RM_CUTS = [
    Cut("stages.rm.update", "ranking_loss", 6),
    Cut("rlhf.runs.checkpoint_files", "save_file", 2),  # in the middle of the second checkpoint
    Cut("stages.rm.train", "measure", 1),
    Cut("rlhf.runs.checkpoints", "remove_others", 2),
    Cut("stages.rm.train", "save_scalar", 1),
]


@pytest.mark.long
def test_a_reward_model_killed_again_and_again_is_the_one_that_was_not(
    configs: dict[str, Any], whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    config = replace(configs["rm"], output_dir=str(tmp_path / "killed"))
    rows = same_when_killed("rm", config, RM_CUTS, whole("rm"))
    assert [row["step"] for row in rows if "rm/loss" in row] == list(range(1, 17))
    assert [row["step"] for row in rows if "rm/held_out_loss" in row] == [8, 16]


SFT_CUTS = [
    Cut("stages.sft.trainer", "_TrainingCallback.on_log", 2),
    Cut("rlhf.runs.checkpoint_files", "save_file", 1),
    Cut("stages.sft.trainer", "save_weights", 3),  # while the best is saved
    Cut("stages.sft.trainer", "_TrainingCallback.on_step_end", 3),
    Cut("rlhf.runs.checkpoints", "remove_others", 1),
    Cut("stages.sft.train", "save_policy", 1),
]


def test_sft_killed_again_and_again_is_the_run_that_was_not(
    configs: dict[str, Any], whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    config = replace(configs["sft"], output_dir=str(tmp_path / "killed"))
    rows = same_when_killed("sft", config, SFT_CUTS, whole("sft"))
    steps = [row["step"] for row in rows if "sft/loss" in row]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 12
    assert [row["step"] for row in rows if "sft/held_out_loss" in row][:3] == [0, 2, 4]


PRETRAIN_CUTS = [
    Cut("stages.pretrain.train", "language_model_loss", 8),
    Cut("rlhf.runs.checkpoints", "remove_others", 1),
    Cut("stages.pretrain.train", "save_policy", 1),
]


def test_pretraining_killed_again_and_again_is_the_run_that_was_not(
    configs: dict[str, Any], whole: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    config = replace(configs["pretrain"], output_dir=str(tmp_path / "killed"))
    rows = same_when_killed("pretrain", config, PRETRAIN_CUTS, whole("pretrain"))
    assert [row["step"] for row in rows if "pretrain/held_out_loss" in row][:2] == [5, 10]


@pytest.mark.parametrize(
    ("stage", "cuts"),
    [pytest.param("ppo", PPO_CUTS[1:3], marks=pytest.mark.long), ("rm", RM_CUTS[1:3])],
    ids=["ppo", "rm"],
)
def test_adapters_killed_again_and_again_are_the_ones_that_were_not(
    configs: dict[str, Any], tmp_path: Path, stage: str, cuts: list[Cut]
) -> None:
    config = replace(configs[stage], lora=LoraSettings(rank=2), output_dir=str(tmp_path / "killed"))
    uncut = replace(config, output_dir=str(tmp_path / "whole"))
    run_to_the_end(stage, uncut, [])
    expected = outcome(tmp_path / "whole")
    same_when_killed(stage, config, cuts, expected, weights="adapter_model.safetensors")


@pytest.mark.long
def test_two_processes_go_on_from_one_checkpoint(configs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(configs["ppo"], output_dir=str(tmp_path / "killed"))
    uncut = replace(config, output_dir=str(tmp_path / "whole"))
    run_to_the_end("ppo", uncut, [], num_processes=2)
    cuts = [
        Cut("stages.ppo.train", "update", 4),  # the second process, in the middle of an update
        Cut("rlhf.runs.checkpoints", "gather_object", 1),  # before it sends its part
    ]
    rows = same_when_killed("ppo", config, cuts, outcome(tmp_path / "whole"), num_processes=2)
    assert [row["step"] for row in rows] == list(range(6))


def test_another_number_of_processes_is_refused(configs: dict[str, Any], tmp_path: Path) -> None:
    config = replace(configs["ppo"], output_dir=str(tmp_path / "run"))
    code, printed = run_command("ppo", config, Cut("stages.ppo.train", "update", 4))
    assert code == KILLED, printed
    code, printed = run_command("ppo", config, num_processes=2)
    assert code == 2 and "the number of processes was 1 and is 2" in printed, printed[-2000:]


def same_when_killed(
    stage: str,
    config: Any,
    cuts: list[Cut],
    expected: dict[str, Any],
    num_processes: int = 1,
    weights: str = "model.safetensors",
) -> list[dict[str, Any]]:
    """Check that a run with cuts leaves the outcome of one without; return its rows."""
    printed = run_to_the_end(stage, config, cuts, num_processes=num_processes)
    assert f"{stage}: resumes after" in printed
    found = outcome(Path(config.output_dir))
    assert {weights, "metrics.jsonl", "results.json"} <= expected.keys()
    for name in expected.keys() | found.keys():
        assert found.get(name) == expected.get(name), name
    assert not Path(config.output_dir, "checkpoints").exists()
    return found["metrics.jsonl"]


def test_what_does_not_fit_the_run_stops_it_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "inputs").mkdir()
    config = make_configs(tmp_path / "inputs", tmp_path)["ppo"]
    config = replace(config, output_dir=str(tmp_path / "run"))
    code, _ = run_command("ppo", config, Cut("stages.ppo.train", "update", 4))
    assert code == KILLED
    step = tmp_path / "run" / "checkpoints" / "step-1"
    other = replace(config, seed=7, ppo=replace(config.ppo, kl_target=2.0), checkpoint_every=3)
    expected = f"error: {step} is of another run: ppo.kl_target was 1.0 and is 2.0; seed was 0 and "
    refused(other, expected + f"is 7; start it as before to go on, or delete {step.parent} ")
    prompts = tmp_path / "inputs" / "prompts.jsonl"
    content = prompts.read_text()
    prompts.write_text(content.replace("say 3", "say 4"))
    refused(config, f"{step} is of another run: what prompts names was other data; what prompts_")
    prompts.write_text(content)
    weights = step / "model.safetensors"
    content_of_weights = weights.read_bytes()
    weights.write_bytes(content_of_weights[:-1] + bytes([content_of_weights[-1] ^ 1]))
    refused(config, f"error: {weights} is altered (sha256 ")
    weights.unlink()
    refused(config, f"error: {weights} is missing; put it back, or delete {step} to start anew")
    weights.write_bytes(content_of_weights)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-1")
    assert "resumes" not in run_to_the_end("ppo", config, [])


def refused(config: Any, message: str) -> None:
    code, printed = run_command("ppo", config)
    assert code == 2 and message in printed, printed[-2000:]
    assert "Traceback" not in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_step_and_saves_it(
    configs: dict[str, Any],
    whole: Callable[[str], dict[str, Any]],
    tmp_path: Path,
    number: int,
) -> None:
    config = replace(configs["ppo"], output_dir=str(tmp_path / "run"), checkpoint_every=100)
    code, printed = run_command("ppo", config, Cut("stages.ppo.train", "update", 3, number))
    step = tmp_path / "run" / "checkpoints" / "step-2"
    assert code == INTERRUPTED
    assert printed.splitlines()[-1] == (
        f"ppo: interrupted after update 2; the same command goes on from {step}"
    )
    assert step.is_dir()
    assert "ppo: resumes after update 2 from" in run_to_the_end("ppo", config, [])
    assert outcome(tmp_path / "run") == whole("ppo")


def test_an_interrupt_outside_of_steps_and_a_second_one_end_at_once(
    configs: dict[str, Any], tmp_path: Path
) -> None:
    config = replace(configs["ppo"], output_dir=str(tmp_path / "run"))
    before = Cut("stages.ppo.setup", "normalize_scores", 1, signal.SIGINT)
    code, printed = run_command("ppo", config, before)
    assert (code, printed.splitlines()[-1]) == (INTERRUPTED, "interrupted")
    twice = Cut("stages.ppo.update", "policy_loss", 1, signal.SIGINT, times=2)
    code, printed = run_command("ppo", config, twice)
    assert (code, printed.splitlines()[-1]) == (INTERRUPTED, "interrupted")
    assert "once more ends at once" in printed
    assert not (tmp_path / "run" / "checkpoints").exists()
