"""An older transformers reads every stage's folder as the newest does, by from_pretrained.

`make test-interop` runs this. It needs .venv-interop, so pytest must not find it by its name.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from rlhf.models.saving import save_policy
from stages.pretrain.train import pretrain
from tests.distributed.chain import LORA, make_inputs, run_chain
from tests.distributed.other_stages import pretrain_settings
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of
from tools.export.config import Config as ExportConfig
from tools.export.export import export

ROOT = Path(__file__).parents[2]
OLD = ROOT / ".venv-interop/bin/python"
READER = Path(__file__).with_name("read_plainly.py")
TOLERANCE = 1e-5

THETA = {"rope_type": "default", "rope_theta": 100_000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LAYERS = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5_000.0},
    "full_attention": {**THETA, "rope_type": "linear", "factor": 4.0},
}
PARTIAL = {**THETA, "partial_rotary_factor": 0.5}

ROTARY = {
    "llama": ("llama", THETA),
    "llama, llama3": ("llama", LLAMA3),
    "llama, linear": ("llama", {**THETA, "rope_type": "linear", "factor": 2.0}),
    "qwen2": ("qwen2", THETA),
    "qwen3, yarn": ("qwen3", YARN),
    "mistral": ("mistral", THETA),
    "gemma2": ("gemma2", THETA),
    "gemma3_text": ("gemma3_text", LAYERS),
    "gpt_neox": ("gpt_neox", PARTIAL),
    "phi": ("phi", PARTIAL),
    "granite": ("granite", THETA),
}
"""Maps a name to an architecture and rope_parameters that are not its default ones."""

STAGES = {
    "base": "policy",
    "pretrain": "policy",
    "sft": "policy",
    "rm": "reward_model",
    "ppo": "policy",
    "adapters/sft": "policy",
    "adapters/rm": "reward_model",
    "adapters/ppo": "policy",
    "merged/ppo": "policy",
    "merged/rm": "reward_model",
}

Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write folders: of each stage, with full weights and adapters, and of each rotary encoding."""
    work = tmp_path_factory.mktemp("interop")
    make_inputs(work)
    tokenizer = byte_tokenizer(
        "<s>",
        "</s>",
        "<pad>",
        "<tool>",
        "<|endoftext|>",  # version 5 gives it to all tokenizers of Qwen 2
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens=["<tool>", "<|endoftext|>"],
    )
    chat = (work / "base" / "chat_template.jinja").read_text(encoding="utf-8")
    tokenizer.chat_template = chat
    for name, (architecture, rope) in ROTARY.items():
        policy = tiny_policy_of(architecture, vocab_size=len(tokenizer), rope_parameters=rope)
        save_policy(policy, tokenizer, work / name)
    save_policy(
        tiny_policy_of("llama", vocab_size=len(tokenizer), rope_parameters=THETA),
        tokenizer,
        work / "base",
    )
    pretrain(pretrain_settings(work, work / "pretrain"))
    run_chain(work, work)
    run_chain(work, work / "adapters", lora=LORA)
    for stage in ("ppo", "rm"):
        source, output = work / "adapters" / stage, work / "merged" / stage
        export(ExportConfig(folder=str(source), output_dir=str(output)))
    return work


@pytest.fixture(scope="module")
def read(folders: Path) -> tuple[Found, Found]:
    """Map each folder to what this environment reads in it, and what the old one reads."""
    kinds = {**dict.fromkeys(ROTARY, "policy"), **STAGES}
    words = [f"{kind}={folders / name}" for name, kind in kinds.items()]
    return run(Path(sys.executable), words), run(OLD, words)


def run(python: Path, words: Iterable[str]) -> Found:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), str(READER), *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_old_environment_is_old(read: tuple[Found, Found]) -> None:
    assert [str(found["version"]).split(".")[0] for found in read] == ["5", "4"]


@pytest.mark.parametrize("name", [*STAGES, *ROTARY])
def test_both_read_the_same(name: str, folders: Path, read: tuple[Found, Found]) -> None:
    new, old = (found[str(folders / name)] for found in read)
    assert "error" not in new, new["error"]
    assert "error" not in old, old["error"]
    assert old.keys() == new.keys()
    for key, value in new.items():
        if key in ("logits", "loss"):
            assert old[key] == pytest.approx(value, abs=TOLERANCE, rel=TOLERANCE), key
        else:
            assert old[key] == value, key
