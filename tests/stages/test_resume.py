"""A run that is killed at any moment and started again is the run that was not, to the bit."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from rlhf.cli import INTERRUPTED
from rlhf.config import OptimSettings
from stages.ppo.config import Config as PPOConfig
from stages.ppo.config import PPOSettings, PtxSettings, RolloutSettings
from tests.stages.cut_runs import KILLED, Cut, outcome, run_command, run_to_the_end


@pytest.fixture
def full_ppo(ppo_config: PPOConfig, ppo_inputs: Path) -> PPOConfig:
    """A run that carries all it can from update to update."""
    text = ppo_inputs / "text.jsonl"
    text.write_text(json.dumps({"text": "the cat sat. " * 40}) + "\n")
    return replace(
        ppo_config,
        prompts_held_out=str(ppo_inputs / "prompts.jsonl"),
        rollout=RolloutSettings(batch_size=16, max_new_tokens=6),
        ppo=PPOSettings(
            mini_batch_size=8, num_epochs=2, kl_target=1.0, kl_horizon=64, value_warmup_updates=1
        ),
        ptx=PtxSettings(coef=0.5, text=str(text), block_tokens=16, blocks_per_episode=0.5),
        reward=replace(ppo_config.reward, normalize_on=32),
        optim=OptimSettings(learning_rate=1e-3, schedule="cosine", warmup_steps=3),
        num_updates=6,
        ema_decay=0.8,
        eval_every=2,
        num_samples=2,
        checkpoint_every=2,
    )


PPO_CUTS = [
    Cut("stages.ppo.update", "policy_loss", 5),  # before the first checkpoint
    Cut("rlhf.checkpoint", "save_file", 2),  # in the middle of the first
    Cut("stages.ppo.train", "update", 3),  # behind the first
    Cut("rlhf.checkpoint", "Path.rename", 1),  # the second is whole, and has not its name yet
    Cut("rlhf.resume", "remove_others", 1),  # it has, and the first is still there
    Cut("stages.ppo.train", "save_policy", 1),
]


def test_ppo_killed_again_and_again_is_the_run_that_was_not(full_ppo: PPOConfig, tmp_path: Path):
    whole = replace(full_ppo, output_dir=str(tmp_path / "whole"))
    killed = replace(full_ppo, output_dir=str(tmp_path / "killed"))
    run_to_the_end("ppo", whole, [])
    printed = run_to_the_end("ppo", killed, PPO_CUTS)
    assert "ppo: resumes after update" in printed
    expected, found = outcome(tmp_path / "whole"), outcome(tmp_path / "killed")
    assert expected.keys() == {
        "model.safetensors", "metrics.jsonl", "samples.jsonl", "results.json"
    }  # fmt: skip
    assert len(expected["metrics.jsonl"]) == 6 and expected["metrics.jsonl"][-1]["ppo/kl"] > 0
    for name in expected:
        assert found[name] == expected[name], name
    assert not (tmp_path / "killed" / "checkpoints").exists()


def test_what_does_not_fit_the_run_stops_it_and_says_how_to_go_on(
    full_ppo: PPOConfig, ppo_inputs: Path, tmp_path: Path
):
    config = replace(full_ppo, output_dir=str(tmp_path / "run"))
    code, _ = run_command("ppo", config, Cut("stages.ppo.train", "update", 4))
    assert code == KILLED
    step = tmp_path / "run" / "checkpoints" / "step-1"
    other = replace(config, seed=7, ppo=replace(config.ppo, kl_target=2.0), checkpoint_every=3)
    expected = f"error: {step} is of another run: ppo.kl_target was 1.0 and is 2.0; seed was 0 and "
    refused(other, expected + f"is 7; start it as before to go on, or delete {step.parent} ")
    prompts = ppo_inputs / "prompts.jsonl"
    content = prompts.read_text()
    prompts.write_text(content.replace("say 3", "say 4"))
    refused(config, f"{step} is of another run: what prompts names was other data; what prompts_")
    prompts.write_text(content)
    weights = step / "models.safetensors"
    content_of_weights = weights.read_bytes()
    weights.write_bytes(content_of_weights[:-1] + b"?")
    refused(config, f"error: {weights} is altered (sha256 ")
    weights.unlink()
    refused(config, f"error: {weights} is missing; put it back, or delete {step} to start anew")
    weights.write_bytes(content_of_weights)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-1")
    assert "resumes" not in run_to_the_end("ppo", config, [])


def refused(config: PPOConfig, message: str) -> None:
    code, printed = run_command("ppo", config)
    assert code == 2 and message in printed, printed[-2000:]
    assert "Traceback" not in printed


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_step_and_saves_it(full_ppo: PPOConfig, tmp_path: Path, number: int):
    config = replace(full_ppo, output_dir=str(tmp_path / "run"), checkpoint_every=100)
    code, printed = run_command("ppo", config, Cut("stages.ppo.train", "update", 3, number))
    step = tmp_path / "run" / "checkpoints" / "step-2"
    assert code == INTERRUPTED
    assert printed.splitlines()[-1] == (
        f"ppo: interrupted after update 2; the same command goes on from {step}"
    )
    assert step.is_dir()
    assert "ppo: resumes after update 2 from" in run_to_the_end("ppo", config, [])
    whole = replace(full_ppo, output_dir=str(tmp_path / "whole"))
    run_to_the_end("ppo", whole, [])
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_an_interrupt_outside_of_steps_and_a_second_one_end_at_once(
    full_ppo: PPOConfig, tmp_path: Path
):
    config = replace(full_ppo, output_dir=str(tmp_path / "run"))
    before = Cut("stages.ppo.train", "normalize_scores", 1, signal.SIGINT)
    code, printed = run_command("ppo", config, before)
    assert (code, printed.splitlines()[-1]) == (INTERRUPTED, "interrupted")
    twice = Cut("stages.ppo.update", "policy_loss", 1, signal.SIGINT, times=2)
    code, printed = run_command("ppo", config, twice)
    assert (code, printed.splitlines()[-1]) == (INTERRUPTED, "interrupted")
    assert "once more ends at once" in printed
    assert not (tmp_path / "run" / "checkpoints").exists()
