"""The peaks that docs/scaling.md and the presets' settings give are those of the plan."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rlhf.runs.settings import load_config
from stages.ppo.config import Config as PPOConfig
from stages.rm.config import Config as RMConfig
from stages.sft.config import Config as SFTConfig
from tools.plan.launch import Launch
from tools.plan.make import make_plan

ROOT = Path(__file__).parents[3]
STAGES: dict[str, Any] = {"sft": SFTConfig, "rm": RMConfig, "ppo": PPOConfig}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}
SIZES: dict[str, dict[str, Any]] = {
    "8b": LLAMA
    | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "3b": LLAMA
    | {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "1b": LLAMA
    | {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "pythia": {
        "model_type": "gpt_neox",
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 8,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "use_parallel_residual": True,
    },
}
"""The published sizes."""
PRESETS = {
    "llama_1b": ("1b", "1b"),
    "llama_8b": ("8b", "3b"),
    "pythia_1b_tldr": ("pythia", "pythia"),
}
"""Maps a preset to its policy and its reward model."""


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", PRESETS)
def test_the_page_gives_the_peaks_of_the_plan(name: str, tmp_path: Path) -> None:
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
    *_, launcher, _, peaks, _ = (cell.strip() for cell in row.split("|"))
    launch = Launch.read(ROOT / f"configs/accelerate/{launcher.strip('`')}.yaml")
    for size in PRESETS[name]:
        own = dict(SIZES[size])
        AutoConfig.for_model(own.pop("model_type"), **own).save_pretrained(tmp_path / size)
    policy, reward = (str(tmp_path / size) for size in PRESETS[name])
    models = {
        "sft": ["--model.path", policy],
        "rm": ["--model.path", reward],
        "ppo": ["--policy.path", policy, "--reward.model", reward],
    }
    found = []
    for stage, config_class in STAGES.items():
        file = ["--config", str(ROOT / f"configs/{stage}/{name}.yaml")]
        config = load_config(config_class, [*file, *models[stage]])
        found.append(f"{make_plan(config, replace(launch, device='cuda')).peak / 1e9:.1f}")
    assert peaks == f"{', '.join(found)} GB"
    settings = (ROOT / f"configs/ppo/{name}.yaml").read_text(encoding="utf-8")
    assert f"The plan says {found[-1]} GB" in settings.replace("\n# ", " ")
