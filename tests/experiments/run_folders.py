"""Writes run folders as a pipeline leaves them, as far as the studies read them."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf.models.settings import ModelSettings
from rlhf.rewards.settings import RewardSettings
from rlhf.runs.folder import CONFIG, METRICS, RESULTS
from rlhf.runs.run import RunSettings
from rlhf.runs.settings import settings_in_use
from stages.evaluate.config import Config as EvaluateConfig
from stages.ppo.config import Config as PPOConfig
from stages.ppo.config import PPOSettings, PtxSettings


def write_run(
    config: RunSettings,
    results: Mapping[str, Any] | None = None,
    metrics: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write a run's settings, what it logged and, for a finished run, its results."""
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(yaml.safe_dump(settings_in_use(config)), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in metrics)
    (folder / METRICS).write_text(lines, encoding="utf-8")
    if results is not None:
        (folder / RESULTS).write_text(json.dumps(results), encoding="utf-8")


def ppo_config(run: str, name: str = "ppo", *, ptx: float = 0.0, kl: float = 0.05) -> PPOConfig:
    return PPOConfig(
        output_dir=f"{run}/{name}",
        policy=ModelSettings(path=f"{run}/sft"),
        prompts=f"{run}/prompts.jsonl",
        prompts_held_out=f"{run}/held_out.jsonl",
        reward=RewardSettings(model=f"{run}/rm"),
        ppo=PPOSettings(kl_coef=kl),
        ptx=PtxSettings(coef=ptx, text=f"{run}/text.jsonl"),
        num_updates=7,
        seed=3,
    )


def evaluate_config(run: str, **changes: Any) -> EvaluateConfig:
    settings: dict[str, Any] = {
        "policies": {"sft": f"{run}/sft", "ppo": f"{run}/ppo", "ppo_ptx": f"{run}/ppo_ptx"},
        "prompts": f"{run}/held_out.jsonl",
        "num_prompts": 9,
        "reports": {"rm": f"{run}/rm"},
        "output_dir": run,
    }
    return EvaluateConfig(**(settings | changes))


def write_evaluation(config: EvaluateConfig) -> None:
    """Write figures that differ by policy: a policy's gold score is its place among them."""
    figures = {
        name: {
            "gold_score": float(number),
            "fact_recall": 1.0 - number / 10,
            "text_loss": 0.5,
            "response_tokens": 9.0,
            "right": 0.5,
            **({"win_rate_vs_sft": 0.8, "kl": 2.0} if name != "sft" else {}),
        }
        for number, name in enumerate(config.policies)
    }
    write_run(config, figures)
