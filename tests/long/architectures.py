"""Takes a tiny model of every decoder-only architecture through SFT, RM, PPO and evaluation.

Writes the results as the table of docs/architectures.md.

    python -m tests.long.architectures
    python -m tests.long.architectures --only mamba qwen3_5 --no-table

Every architecture runs the real stages, with real files between them, in a process of its own. Its
greedy text is also compared with passes without a cache. The program takes about an hour of one
core. It fails unless every architecture works or is refused by a message (exit code 2).
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from rlhf.generation.decoder import DECODING_MODES, decoding_mode_for
from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.models.architectures import scalar_class
from rlhf.models.compat import attention_of
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_policy
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
from tests.rlhf.every_architecture import MODEL_TYPES, save_tiny
from tests.rlhf.tiny_models import byte_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
MARK = "<!-- The rest of this page is written by tests/long/architectures.py. -->"
SECONDS = 900
"""Longest time of one architecture."""
STAGES = ("sft", "rm", "ppo", "evaluate")

Outcome = dict[str, Any]
"""model_type and result; if it works, also packing, sampling and head."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=MODEL_TYPES, help="model types to try")
    parser.add_argument("--no-table", action="store_true", help="only print what came out")
    parser.add_argument("--log", type=Path, help="JSON Lines to append to, and to go on from")
    options = parser.parse_args()
    done = {} if options.log is None or not options.log.exists() else read_log(options.log)
    with contextlib.suppress(ImportError):
        importlib.import_module("deepspeed")  # each process would import it anew
    outcomes = []
    for model_type in options.only:
        outcome = done.get(model_type) or in_own_process(model_type)
        outcomes.append(outcome)
        print(json.dumps(outcome), flush=True)
        if options.log is not None and model_type not in done:
            with options.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(outcome) + "\n")
    if not options.no_table:
        text = PAGE.read_text(encoding="utf-8").split(MARK)[0]
        PAGE.write_text(text + MARK + "\n\n" + table_of(outcomes), encoding="utf-8")
    broken = [one["model_type"] for one in outcomes if one["result"].startswith("fails")]
    if broken:
        sys.exit(f"neither working nor refused: {', '.join(broken)}")


def read_log(path: Path) -> dict[str, Outcome]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {row["model_type"]: row for row in rows}


def in_own_process(model_type: str) -> Outcome:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(try_out(model_type)))
    process.start()
    sender.close()
    try:
        if receiver.poll(SECONDS):
            return receiver.recv()
        return {"model_type": model_type, "result": f"fails: no answer in {SECONDS} seconds"}
    except EOFError:
        return {"model_type": model_type, "result": "fails: the process died"}
    finally:
        process.kill()
        process.join()


def try_out(model_type: str) -> Outcome:
    """Run all stages in this process."""
    outcome: Outcome = {"model_type": model_type}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        output = io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                outcome |= run_all(model_type, Path(folder))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            outcome["result"] = (
                f"fails: {type(error).__name__}: {one_line(str(error))} "
                f"({Path(place.filename).name}:{place.lineno})"
            ).replace(folder, "FOLDER")
    return outcome


def run_all(model_type: str, folder: Path) -> Outcome:
    base = str(folder / "base")
    try:
        save_tiny(model_type, tokenizer(), base)
    except Exception as error:
        return {"result": f"not tried: no tiny model of it could be made ({one_line(str(error))})"}
    write_data(folder)
    for stage, run in stages_of(folder).items():
        try:
            run()
        except (ValueError, OSError) as error:
            reason = one_line(str(error).replace(str(folder), "FOLDER"))
            return {"result": f"refused by {stage}, because {reason}"}
    policy = load_policy(ModelSettings(path=str(folder / "ppo")))
    check_greedy(policy, load_chat(ModelSettings(path=str(folder / "ppo"))))
    is_shared = packer_for(policy, 256).shares_prompts
    names = ("side by side", "prompts of one length at a time", "without a cache")
    own = scalar_class(policy.config) is not transformers.AutoModelForSequenceClassification
    return {
        "result": "works" if is_shared else "works unshared",
        "sampling": dict(zip(DECODING_MODES, names, strict=True))[decoding_mode_for(policy)],
        "head": "ours" if own else "transformers'",
        # Readers of the table do not know our own name for it.
        "attention": attention_of(policy).removeprefix("packed_"),
    }


def stages_of(folder: Path) -> dict[str, Callable[[], None]]:
    lengths = ["--max_prompt_tokens", "60", "--max_response_tokens", "12"]
    sft = [*lengths, "--model.path", f"{folder}/base", "--demonstrations", f"{folder}/demos.jsonl"]
    sft += ["--held_out", "0.25", "--num_epochs", "1", "--batch_size", "8", "--num_samples", "2"]
    rm = [*lengths, "--model.path", f"{folder}/sft", "--rankings", f"[{folder}/rankings.jsonl]"]
    rm += ["--held_out", "0.25", "--batch_size", "8", "--demonstrations", f"{folder}/demos.jsonl"]
    ppo = ["--policy.path", f"{folder}/sft", "--reward.model", f"{folder}/rm", "--ptx.coef", "0"]
    ppo += ["--prompts", f"{folder}/prompts.jsonl", "--num_updates", "1"]
    ppo += ["--rollout.batch_size", "4", "--ppo.mini_batch_size", "4"]
    ppo += ["--rollout.max_prompt_tokens", "60", "--rollout.max_new_tokens", "8"]
    ppo += ["--reward.allow_chance_reward", "true", "--monitor.min_eos_rate", "0"]
    judge = ["--policies.sft", f"{folder}/sft", "--policies.ppo", f"{folder}/ppo"]
    judge += ["--prompts", f"{folder}/prompts.jsonl", "--reward_model", f"{folder}/rm"]
    judge += ["--max_prompt_tokens", "60", "--max_new_tokens", "8", "--num_prompts", "4"]
    judge += ["--allow_chance_reward", "true"]

    def run(function: Any, config_class: Any, words: Sequence[str], stage: str) -> None:
        function(load_config(config_class, [*words, "--output_dir", f"{folder}/{stage}"]))

    return {
        "sft": lambda: run(train_sft, SFTConfig, sft, "sft"),
        "rm": lambda: run(train_rm, RMConfig, rm, "rm"),
        "ppo": lambda: run(train_ppo, PPOConfig, ppo, "ppo"),
        "evaluate": lambda: run(evaluate, EvaluateConfig, judge, "evaluation"),
    }


def write_data(folder: Path) -> None:
    questions = [f"Name fruit {'x' * (i % 5)}{i}." for i in range(12)]
    demonstrations = [{"prompt": one, "response": "pear"} for one in questions]
    rankings = [
        {"prompt": one, "responses": ["a pear", "no", "xx"], "ranks": [1, 2, 3]}
        for one in questions
    ]
    prompts = [{"prompt": one} for one in questions]
    for name, rows in (
        ("demos.jsonl", demonstrations),
        ("rankings.jsonl", rankings),
        ("prompts.jsonl", prompts),
    ):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@torch.no_grad()
def check_greedy(policy: PreTrainedModel, chat: Chat) -> None:
    """Raise AssertionError if the loop's text differs from that of passes without a cache."""
    prompts = [chat.prompt_ids(f"Name fruit {'x' * number}.") for number in (1, 4, 9)]
    decoding = Decoding(end_id=chat.end_id, max_new_tokens=8, temperature=0)
    found = generate(policy, prompts, GenerationSettings(), decoding).responses
    for prompt, response in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in response:
            ids.append(
                int(policy(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            )
        assert ids[len(prompt) :] == response, "greedy text without its history"


def tokenizer() -> Any:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    # transformers gives <|endoftext|> to every tokenizer of some architectures, such as Qwen 2.
    made = byte_tokenizer("<s>", "</s>", "<pad>", "<|endoftext|>", **names)
    Chat(made)
    return made


def one_line(text: str) -> str:
    return " ".join(text.split())[:300]


def table_of(outcomes: Sequence[Outcome]) -> str:
    results = [one["result"] for one in outcomes]
    numbers = {
        "work": results.count("works"),
        "work unshared": results.count("works unshared"),
        "are refused by name": sum(result.startswith("refused") for result in results),
        "fail": sum(result.startswith("fails") for result in results),
        "could not be tried": sum(result.startswith("not tried") for result in results),
    }
    lines = [
        f"transformers {transformers.__version__} has {len(MODEL_TYPES)} such model types, and "
        f"{len(outcomes)} have a line here: "
        + ", ".join(f"{number} {what}" for what, number in numbers.items() if number)
        + ".",
        "",
        "| model_type | result | sampling | head of scores | attention |",
        "|---|---|---|---|---|",
    ]
    for one in outcomes:
        cells = [one["result"], one.get("sampling"), one.get("head"), one.get("attention")]
        text = " | ".join((cell or "-").replace("|", "/") for cell in cells)
        lines.append(f"| `{one['model_type']}` | {text} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
