"""SFT, then a reward model, then PPO with ptx, on a tiny Llama: inputs, settings, and the run."""

import json
from pathlib import Path
from typing import Any

from accelerate import PartialState

from rlhf.inputs.chat import Chat
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.rewards.settings import RewardSettings
from rlhf.training.settings import OptimSettings
from stages.ppo import config as ppo_config
from stages.ppo import train as ppo_train
from stages.rm import config as rm_config
from stages.rm import train as rm_train
from stages.sft import config as sft_config
from stages.sft import train as sft_train
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

LORA = LoraSettings(rank=4)
OPTIM = OptimSettings(learning_rate=1e-3, schedule="constant", eps=1e-4)
"""A large eps: Adam would blow up differences of rounding where a gradient is almost zero."""


def make_inputs(folder: Path, num_rows: int = 24, **sizes: Any) -> None:
    """A base model with these sizes, and as many rows of each kind of records."""
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    Chat(tokenizer)
    base = tiny_policy_of("llama", vocab_size=len(tokenizer), **sizes)
    save_policy(base, tokenizer, folder / "base")
    rows = range(num_rows)
    write(folder, "demonstrations", [{"prompt": f"q{i}", "response": "a" * (i % 5)} for i in rows])
    write(folder, "prompts", [{"prompt": f"q{i}"} for i in rows])
    write(folder, "text", [{"text": f"document {i} of the text"} for i in range(12)])
    write(folder, "rankings", [ranking(i) for i in rows])
    write(folder, "held_out", [ranking(i) for i in range(1000, 1007)])


def ranking(number: int) -> dict[str, Any]:
    """Longer answers win; some of them are nothing but their end."""
    sizes = [number % 7, 7, 3 + number % 2][: 2 + number % 2]
    order = sorted(sizes, reverse=True)
    return {
        "prompt": f"q{number}",
        "responses": ["ab" * size for size in sizes],
        "ranks": [1 + order.index(size) for size in sizes],
    }


def write(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{name}.jsonl").write_text(text)


def sft_settings(folder: Path, out: Path, **changes: Any) -> sft_config.Config:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "model": ModelSettings(path=str(folder / "base")),
        "demonstrations": str(folder / "demonstrations.jsonl"),
        "held_out": 0.25,
        "num_epochs": 1,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_response_tokens": 8,
        "num_samples": 3,
        "eval_every": 3,
        "optim": OPTIM,
    }
    return sft_config.Config(**(settings | changes))


def rm_settings(folder: Path, model: Path, out: Path, **changes: Any) -> rm_config.Config:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "model": ModelSettings(path=str(model)),
        "rankings": [str(folder / "rankings.jsonl")],
        "held_out_rankings": [str(folder / "held_out.jsonl")],
        "demonstrations": str(folder / "demonstrations.jsonl"),
        "batch_size": 5,
        "micro_batch_tokens": 60,
        "num_epochs": 1,
        "optim": OPTIM,
    }
    return rm_config.Config(**(settings | changes))


def ppo_settings(folder: Path, sft: Path, rm: Path, out: Path, **changes: Any) -> ppo_config.Config:
    settings: dict[str, Any] = {
        "output_dir": str(out),
        "policy": ModelSettings(path=str(sft)),
        "prompts": str(folder / "prompts.jsonl"),
        "prompts_held_out": str(folder / "prompts.jsonl"),
        "num_eval_prompts": 7,
        "reward": RewardSettings(model=str(rm), allow_chance_reward=True, normalize_on=4),
        "rollout": ppo_config.RolloutSettings(batch_size=8, max_new_tokens=6),
        "ppo": ppo_config.PPOSettings(mini_batch_size=4, value_warmup_updates=1),
        "ptx": ppo_config.PtxSettings(
            coef=0.5,
            text=str(folder / "text.jsonl"),
            blocks_per_episode=0.75,
            block_tokens=16,
            targets="reference" if "lora" in changes else "text",  # so launchers run both
        ),
        "monitor": ppo_config.MonitorSettings(min_eos_rate=0.0, stop_on=[]),
        "optim": OPTIM,
        "value_learning_rate": 2e-3,
        "num_updates": 3,
        "ema_decay": 0.5,
        "micro_batch_tokens": 40,
    }
    return ppo_config.Config(**(settings | changes))


def run_chain(folder: Path, out: Path, **changes: Any) -> None:
    """Each stage takes the folder that the one before it wrote; changes are for all of them."""
    sft_train.train(sft_settings(folder, out / "sft", **changes))
    PartialState().wait_for_everyone()  # the first process writes while the others are done
    run_rest_of_chain(folder, out / "sft", out, **changes)


def run_rest_of_chain(folder: Path, sft: Path, out: Path, **changes: Any) -> None:
    """What comes after SFT."""
    rm_train.train(rm_settings(folder, sft, out / "rm", **changes))
    PartialState().wait_for_everyone()
    ppo_train.train(ppo_settings(folder, sft, out / "rm", out / "ppo", **changes))
    PartialState().wait_for_everyone()
