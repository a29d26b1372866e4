"""Runs the presets for real sizes, on models of their architectures with two random layers.

The commands in a preset's header convert a few rows in the layouts of its public data sets. Then
SFT, reward model, PPO and evaluation run with the preset's files, each as it is but for sizes.
"""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from data.convert.program import ConvertConfig, convert
from rlhf.models.loading import new_policy
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.runs.settings import load_config
from stages.evaluate.config import Config as EvaluateConfig
from stages.evaluate.evaluate import evaluate
from stages.ppo.config import Config as PPOConfig
from stages.ppo.train import train as train_ppo
from stages.rm.config import Config as RMConfig
from stages.rm.train import train as train_rm
from stages.sft.config import Config as SFTConfig
from stages.sft.train import train as train_sft
from tests.rlhf.tiny_models import byte_tokenizer
from tools.plan.launch import Launch

ROOT = Path(__file__).parents[2]

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "initializer_range": 0.2,
}
PYTHIA = {
    "model_type": "gpt_neox",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "rotary_pct": 0.25,
    "use_parallel_residual": True,
    "initializer_range": 0.2,
}


def llama_tokenizer() -> PreTrainedTokenizerBase:
    """Make a tokenizer without padding token or chat template, like those of the base models."""
    ends = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    return byte_tokenizer(*ends.values(), "<|finetune_right_pad_id|>", **ends)


def pythia_tokenizer() -> PreTrainedTokenizerBase:
    end = "<|endoftext|>"
    return byte_tokenizer(end, "<|padding|>", bos_token=end, eos_token=end, unk_token=end)


@dataclass(frozen=True)
class Preset:
    """Holds what a preset's own files do not say."""

    launcher: str
    """The launcher file that its header names."""
    bases: dict[str, dict[str, Any]]
    """Maps each model that it starts from, as its settings name it, to a small config."""
    tokenizer: Callable[[], PreTrainedTokenizerBase]
    aligned: str
    """Folder of the policy after PPO."""


PRESETS = {
    "llama_1b": Preset(
        "gpu",
        {"meta-llama/Llama-3.2-1B": LLAMA | {"tie_word_embeddings": True}},
        llama_tokenizer,
        "ppo_ptx",
    ),
    "llama_8b": Preset(
        "fsdp2",
        {
            "meta-llama/Llama-3.1-8B": LLAMA,
            "meta-llama/Llama-3.2-3B": LLAMA | {"hidden_size": 16, "tie_word_embeddings": True},
        },
        llama_tokenizer,
        "ppo_ptx",
    ),
    "pythia_1b_tldr": Preset(
        "deepspeed_zero2", {"${run_dir}/base": PYTHIA}, pythia_tokenizer, "ppo"
    ),
}
LONG = ("pythia_1b_tldr", "llama_8b")
"""Presets whose starts are long tests; that of llama_1b runs the same stages."""


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def conversation(i: int) -> dict[str, Any]:
    system = [{"role": "system", "content": "Be brief."}] * (i % 2)
    messages = [*system, user(f"Say {i}."), assistant(f"{i}")]
    return {"prompt": f"Say {i}.", "prompt_id": str(i), "messages": messages}


def rated(i: int) -> dict[str, Any]:
    completions = [
        {
            "model": "some",
            "response": "so " * rating + str(i),
            "annotations": {"helpfulness": {"Rating": str(rating), "Rationale": "It is."}},
            "overall_score": float(rating),
        }
        for rating in (3, 1, 4, 2)
    ]
    return {"source": "evol_instruct", "instruction": f"Count to {i}.", "completions": completions}


def post(i: int) -> str:
    return f"SUBREDDIT: r/tests\n\nTITLE: Post {i}\n\nPOST: I wrote {i} tests.\n\nTL;DR:"


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "HuggingFaceH4/no_robots": conversation,
    "HuggingFaceH4/ultrachat_200k": conversation,
    "openbmb/UltraFeedback": rated,
    "Salesforce/wikitext": lambda i: {"text": f" Chapter {i} of a long book about tests . \n" * 3},
    "trl-lib/tldr": lambda i: {"prompt": post(i), "completion": f" Wrote {i} tests."},
    "trl-lib/tldr-preference": lambda i: {
        "prompt": post(i),
        "chosen": f" Wrote {i} tests.",
        "rejected": " Wrote",
    },
}
"""Maps each public data set to a row in its layout."""
NUM_ROWS = 40


def header_commands(preset: str) -> list[list[str]]:
    """Return the commands in the header of the SFT settings, as words, with D= and R= put in."""
    lines = (ROOT / f"configs/sft/{preset}.yaml").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line[4:] for line in lines if line.startswith("#   "))
    commands: list[list[str]] = []
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        name, is_variable, value = line.partition("=")
        if is_variable and len(name) == 1:
            variables[f"${name}"] = value
            continue
        for variable, value in variables.items():
            line = line.replace(variable, value)
        commands.append(shlex.split(line))
    return commands


def convert_samples(preset: str, work: Path, run: Path) -> None:
    """Run the header's `data.convert` and `cp` commands on samples instead of the hub's files."""

    def placed(word: str) -> str:
        return word.replace(f"runs/{preset}", str(run))

    for words in header_commands(preset):
        if words[0] == "cp":
            shutil.copy(ROOT / words[1], placed(words[2]))
        if words[:3] != ["python", "-m", "data.convert"]:
            continue
        at = words.index("--input") + 1
        name, *split = words[at].removeprefix("hub:").split(":")
        sample = work / f"{'-'.join([name.replace('/', '-'), *split])}.jsonl"
        first = NUM_ROWS * len(split)  # different rows in each split
        rows = [json.dumps(ROWS[name](first + i)) for i in range(NUM_ROWS)]
        sample.write_text("\n".join(rows) + "\n")
        options = [placed(word) for word in words[3:]]
        options[at - 3] = str(sample)
        convert(load_config(ConvertConfig, options))


def save_base(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    torch.manual_seed(0)
    save_policy(new_policy(config, tokenizer), tokenizer, folder)
    # A base model has no template; load_tokenizer would have added ours.
    (folder / "chat_template.jinja").unlink(missing_ok=True)


def shrunk(config: PPOConfig, factor: int) -> list[str]:
    """Return words that divide the batch sizes in the file, which keeps their proportion."""
    sizes = {
        "rollout.batch_size": config.rollout.batch_size,
        "ppo.mini_batch_size": config.ppo.mini_batch_size,
        "generation.batch_size": config.generation.batch_size,
    }
    assert not any(size % factor for size in sizes.values())
    return [word for name, size in sizes.items() for word in (f"--{name}", str(size // factor))]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # about a policy that learned nothing
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.long] if name in LONG else []) for name in PRESETS],
)
def test_every_stage_starts_with_the_presets_own_files(name: str, tmp_path: Path) -> None:
    preset, run = PRESETS[name], tmp_path / "run"
    bases = {}
    for model, config in preset.bases.items():
        folder = Path(model.replace("${run_dir}", str(run)))
        bases[model] = folder if folder.is_absolute() else tmp_path / folder
        save_base(config, preset.tokenizer(), bases[model])
    convert_samples(name, tmp_path, run)

    def settings(stage: str, config_class: type, *words: str) -> Any:
        file = ROOT / f"configs/{stage}/{name}.yaml"
        own: Any = load_config(config_class, ["--config", str(file), "--run_dir", str(run)])
        model = getattr(own, "model", None)
        if model is not None and model.path in bases:  # a hub id
            words = ("--model.path", str(bases[model.path]), *words)
        return load_config(config_class, ["--config", str(file), "--run_dir", str(run), *words])

    train_sft(settings("sft", SFTConfig, "--num_samples", "2"))
    train_rm(settings("rm", RMConfig, *(["--held_out", "0.4"] if "llama" in name else [])))
    file = ["--config", str(ROOT / f"configs/ppo/{name}.yaml")]
    few = ["--num_updates", "1", "--rollout.max_new_tokens", "8", "--num_eval_prompts", "2"]
    # One step on random weights leaves a reward model that may be no better than a coin.
    coin = ["--reward.allow_chance_reward", "true"]
    train_ppo(settings("ppo", PPOConfig, *shrunk(load_config(PPOConfig, file), 16), *few, *coin))
    few = ["--num_prompts", "4", "--max_new_tokens", "8", "--num_texts", "2"]
    evaluate(settings("evaluate", EvaluateConfig, *few, "--allow_chance_reward", "true"))

    results = json.loads((run / "results.json").read_text())
    assert list(results["policies"]) == ["sft", preset.aligned]
    assert (run / preset.aligned / "results.json").is_file()


@pytest.mark.parametrize("name", PRESETS)
def test_the_processes_of_the_launcher_can_share_each_batch(name: str) -> None:
    launch = Launch.read(ROOT / f"configs/accelerate/{PRESETS[name].launcher}.yaml")
    header = (ROOT / f"configs/sft/{name}.yaml").read_text(encoding="utf-8")
    assert f"configs/accelerate/{PRESETS[name].launcher}.yaml" in header

    def settings(stage: str, config_class: type) -> Any:
        return load_config(config_class, ["--config", str(ROOT / f"configs/{stage}/{name}.yaml")])

    assert settings("sft", SFTConfig).rows_per_pass(launch.num_processes) > 0
    ppo = settings("ppo", PPOConfig)
    ppo.check_launch(launch.mixed_precision, launch.num_processes)
    assert ppo.rollout.batch_size % launch.num_processes == 0


def test_tldr_is_rendered_as_in_the_paper(tmp_path: Path) -> None:
    """It is post, space, summary, end of text, and nothing else (Huang et al. 2024)."""
    save_base(PYTHIA, pythia_tokenizer(), tmp_path / "base")
    shutil.copy(
        ROOT / "configs/presets/pythia_1b_tldr.jinja", tmp_path / "base/chat_template.jinja"
    )
    chat = load_chat(ModelSettings(path=str(tmp_path / "base")))
    assert chat.tokenizer.decode(chat.prompt_ids(post(3))) == post(3)
    assert chat.tokenizer.decode(chat.response_ids("A test.")) == " A test.<|endoftext|>"
