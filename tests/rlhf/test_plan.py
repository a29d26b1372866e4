"""The plan's peaks against the memory of real runs, and its table for every shipped preset."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from rlhf.chat import Chat
from rlhf.config import GenerationSettings, ModelSettings, OptimSettings
from rlhf.models import save_policy
from rlhf.rewards import RewardSettings
from rlhf.runs import settings_in_force
from stages.ppo.config import Config, MonitorSettings, PPOSettings, PtxSettings, RolloutSettings
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

ROOT = Path(__file__).parents[2]
VOCAB = 4096
PROMPT_TOKENS = 112
TOLERANCE = 0.15

SMALL = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
"""6.6 million weights."""
LARGE = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
"""22 million."""


def write_inputs(folder: Path, **size: int) -> Path:
    """A policy, prompts of PROMPT_TOKENS tokens each, and text."""
    folder.mkdir()
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    policy = tiny_policy_of("llama", vocab_size=VOCAB, **heads, **size)
    for parameter in policy.parameters():
        parameter.data.mul_(0.1)  # sure of nothing, so that responses do not end
    save_policy(policy, tokenizer, folder / "sft")
    filler = PROMPT_TOKENS - len(Chat(tokenizer).prompt_ids(""))
    rows = [{"prompt": letter * filler} for letter in "abcdefgh"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text(json.dumps({"text": "the cat sat. " * 400}) + "\n")
    return folder


def run_config(folder: Path, output: Path, **changes: Any) -> Config:
    settings = Config(
        output_dir=str(output),
        policy=ModelSettings(path=str(folder / "sft")),
        prompts=str(folder / "prompts.jsonl"),
        reward=RewardSettings(function="tests.stages.conftest:some_length"),
        rollout=RolloutSettings(batch_size=8, max_prompt_tokens=PROMPT_TOKENS, max_new_tokens=16),
        generation=GenerationSettings(batch_size=8),
        ppo=PPOSettings(mini_batch_size=4, value_clip_range=None),
        ptx=PtxSettings(coef=0.0),
        monitor=MonitorSettings(stop_on=[]),
        optim=OptimSettings(learning_rate=1e-5, schedule="constant"),
        micro_batch_tokens=256,
        num_updates=1,
        ema_decay=None,
    )
    return replace(settings, **changes)


def measured_peak(folder: Path, config: Config) -> int:
    """Of the run in a process of its own, where freed memory goes back to the system at once."""
    warm_up = run_config(
        write_inputs(folder / "tiny"),
        folder / "warm_up",
        rollout=replace(config.rollout, batch_size=2, max_new_tokens=2),
        ppo=replace(config.ppo, mini_batch_size=2),
        ptx=replace(config.ptx, text=str(folder / "tiny/text.jsonl"), block_tokens=8),
        ema_decay=config.ema_decay,
    )
    for name, one in (("warm_up", warm_up), ("run", config)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings_in_force(one)))
    output = subprocess.check_output(
        [sys.executable, "-m", "tests.rlhf.measured_run", "warm_up.yaml", "run.yaml"],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MALLOC_MMAP_THRESHOLD_": "262144",
            "MALLOC_ARENA_MAX": "1",
        },
        text=True,
    )
    return int(output.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        (SMALL, {}),
        (LARGE, {}),
        (SMALL, {"ptx": PTX, "ema_decay": 0.9, "micro_batch_tokens": 512}),
        (SMALL, {"gradient_checkpointing": True, "micro_batch_tokens": 512}),
    ],
    ids=["6.6M", "22M", "6.6M text", "6.6M checkpointing"],
)
def test_the_peak_of_a_run_is_what_was_planned(
    size: dict[str, int], changes: dict[str, Any], tmp_path: Path
) -> None:
    inputs = write_inputs(tmp_path / "inputs", **size)
    config = run_config(inputs, tmp_path / "run", **changes)
    config = replace(config, ptx=replace(config.ptx, text=str(inputs / "text.jsonl")))
    planned = make_plan(config, Launch()).peak
    assert measured_peak(tmp_path, config) == pytest.approx(planned, rel=TOLERANCE)
