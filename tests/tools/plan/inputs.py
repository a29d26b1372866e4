"""Writes small models, prompts and text, and the settings of runs on them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.models.loading import load_scalar
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.settings import RewardSettings
from rlhf.training.settings import OptimSettings
from stages.ppo.config import Config, MonitorSettings, PPOSettings, PtxSettings, RolloutSettings
from stages.rm.config import Config as RMConfig
from stages.sft.config import Config as SFTConfig
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

VOCAB = 4096
PROMPT_TOKENS = 112

SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
"""A model of 6.6 million weights."""
LARGE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
"""A model of 22 million weights."""


TEXT = PtxSettings(coef=0.1, text="text.jsonl", block_tokens=64, blocks_per_episode=2.0)
TAUGHT = replace(TEXT, targets="reference", block_tokens=128)
"""Its row of text is the largest pass."""


def write_inputs(folder: Path, **size: Any) -> Path:
    """Write a policy, prompts of PROMPT_TOKENS tokens each, and text."""
    folder.mkdir()
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
    policy = tiny_policy_of("llama", vocab_size=VOCAB, **heads, **size)
    for parameter in policy.parameters():
        parameter.data.mul_(0.1)  # unsure of everything, so that responses do not end
    save_policy(policy, tokenizer, folder / "sft")
    filler = PROMPT_TOKENS - len(Chat(tokenizer).prompt_ids(""))
    rows = [{"prompt": letter * filler} for letter in "abcdefgh"]
    write_rows(folder / "prompts.jsonl", rows)
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


NUM_RESPONSES = 4


def ranking_config(folder: Path, output: Path, response_tokens: int) -> RMConfig:
    """Write rankings of four such responses, and return settings that put one into a row."""
    texts = [letter * (response_tokens - 1) for letter in "wxyz"]
    rows = [
        {**json.loads(line), "responses": texts, "ranks": [1, 2, 3, 4]}
        for line in (folder / "prompts.jsonl").read_text().splitlines()
    ]
    write_rows(folder / "rankings.jsonl", rows[:4])
    write_rows(folder / "held_out.jsonl", rows[4:6])
    demonstrations = [{"prompt": row["prompt"], "response": texts[0]} for row in rows[6:]]
    write_rows(folder / "demonstrations.jsonl", demonstrations)
    return RMConfig(
        output_dir=str(output),
        model=ModelSettings(path=str(folder / "sft")),
        rankings=[str(folder / "rankings.jsonl")],
        held_out_rankings=[str(folder / "held_out.jsonl")],
        demonstrations=str(folder / "demonstrations.jsonl"),
        max_prompt_tokens=PROMPT_TOKENS,
        max_response_tokens=response_tokens,
        max_responses=NUM_RESPONSES,
        micro_batch_tokens=PROMPT_TOKENS + NUM_RESPONSES * response_tokens,
        batch_size=2,
        checkpoint_every=None,
    )


def fine_tuning_config(folder: Path, output: Path, response_tokens: int) -> SFTConfig:
    """Write demonstrations, and return settings with two rows a pass, several passes a step."""
    rows = [
        {**json.loads(line), "response": letter * (response_tokens - 1)}
        for line in (folder / "prompts.jsonl").read_text().splitlines()
        for letter in "uv"
    ]
    write_rows(folder / "demonstrations.jsonl", rows)
    return SFTConfig(
        output_dir=str(output),
        model=ModelSettings(path=str(folder / "sft")),
        demonstrations=str(folder / "demonstrations.jsonl"),
        max_prompt_tokens=PROMPT_TOKENS,
        max_response_tokens=response_tokens,
        held_out=0.5,
        max_held_out=2,
        batch_size=8,
        micro_batch_size=2,
        micro_batch_tokens=256,
        num_samples=2,
        num_epochs=1,
        optim=OptimSettings(learning_rate=1e-5, schedule="constant"),
        checkpoint_every=None,
    )


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def weights_of(tiny: Path) -> int:
    """Return the bytes of the policy's weights on disk."""
    return sum(weight.nbytes for weight in load_file(tiny / "sft/model.safetensors").values())


def save_reward(base: Path, folder: Path, lora: LoraSettings) -> str:
    """Save a reward model on the body of a policy."""
    settings = ModelSettings(path=str(base))
    load_scalar(settings, new_head=True, lora=lora).save(folder, load_tokenizer(str(base)))
    return str(folder)


EMBEDDING = VOCAB * 32
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
"""Numbers of q, k and v, o, gate and up and down, and two norms."""
OUTSIDE = 2 * EMBEDDING + 32
"""Of the policy: embedding, unembedding and the last norm."""
