"""Cuts runs off: a process kills itself at a chosen moment, and the same command is given again.

This goes on until a process reaches the end. Each is forked from one that has imported the stages,
so that it takes the time of its run only. The program does not know of this, because the cut
counts calls of the program's own functions.
"""

import importlib
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import yaml

from rlhf.inputs.files import write_records
from rlhf.inputs.records import Demonstration, Ranking, Text
from rlhf.models.settings import ModelSettings
from rlhf.runs.program import run_stage
from rlhf.runs.settings import settings_in_use
from rlhf.training.settings import OptimSettings
from stages.ppo.config import PPOSettings, PtxSettings, RolloutSettings
from stages.pretrain.config import ArchitectureSettings
from stages.pretrain.config import Config as PretrainConfig
from stages.rm.config import Config as RewardModelConfig
from stages.sft.config import Config as SFTConfig
from tests.distributed.gpu_files import launched_as, split_weights
from tests.stages.conftest import is_timing, make_ppo_config, write_ppo_inputs

KILLED = -signal.SIGKILL
RESULTS_OF_TIME = ("seconds", "phase_seconds", "tokens_per_second", "model_flops_utilisation")
WHOLE_BELOW = 100
"""Weights of fewer numbers stay whole under ZeRO-3: vectors of the tiny models, not matrices."""
_SERVER = multiprocessing.get_context("forkserver")
STAGES = ("pretrain", "sft", "rm", "ppo")
_SERVER.set_forkserver_preload(
    ["tests.stages.cut_runs", *(f"stages.{s}.train" for s in STAGES), "tests.stages.preloaded"]
)


@dataclass(frozen=True)
class Cut:
    """Says when a process sends itself a signal: before the calls of a function from `call` on."""

    module: str
    function: str
    call: int
    signal: int = signal.SIGKILL
    times: int = 1
    rank: int | None = None
    """The process that is cut. None means the last one."""


def run_command(
    stage: str,
    config: Any,
    cut: Cut | None = None,
    *,
    num_processes: int = 1,
    launcher: str | None = None,
) -> tuple[int, str]:
    """Run a stage as its command line does; return the exit code and what was printed.

    Of several processes the last one is cut, unless the cut names another.

    Args:
        launcher: Name of a file in configs/accelerate that splits models (see
            tests/distributed/gpu_files.py). None means plain processes.
    """
    processes, log = start_command(
        stage, config, cut, num_processes=num_processes, launcher=launcher
    )
    return wait_for(processes), log.read_text()


def wait_for(processes: Sequence[Any], seconds: float | None = None, victim: int = 0) -> int:
    """Wait until all processes have ended or one has failed; end the others, as a launcher does.

    Return the exit code of the one that failed, or 0.

    Args:
        seconds: The time after which the process with the number `victim` is killed.
    """
    end = None if seconds is None else time.monotonic() + seconds
    failed = None
    while failed is None and any(process.is_alive() for process in processes):
        left = None if end is None else max(end - time.monotonic(), 0.0)
        if not wait([process.sentinel for process in processes if process.is_alive()], left):
            processes[victim].kill()
            end = None
        failed = next((process.exitcode for process in processes if process.exitcode), None)
    for process in processes:
        process.kill()
        process.join()
    return failed or 0


def start_server() -> None:
    """Start the process that runs are forked from, unless it runs; wait for its imports."""
    process = _SERVER.Process(target=int)
    process.start()
    process.join()


def start_command(
    stage: str,
    config: Any,
    cut: Cut | None = None,
    *,
    num_processes: int = 1,
    launcher: str | None = None,
) -> tuple[list[Any], Path]:
    """Start a stage without waiting; return its processes, and the file of the first's output."""
    folder = Path(config.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    settings = folder.with_suffix(".yaml")
    settings.write_text(yaml.safe_dump(settings_in_use(config)))
    logs = [folder.with_suffix(f".{rank}.log") for rank in range(num_processes)]
    launched = [{} for _ in logs] if num_processes == 1 else _launcher_variables(num_processes)
    cut_rank = num_processes - 1 if cut is None or cut.rank is None else cut.rank
    cuts = [cut if rank == cut_rank else None for rank in range(num_processes)]
    processes = [
        _SERVER.Process(target=_run, args=(stage, settings, log, one, own, launcher))
        for log, one, own in zip(logs, cuts, launched, strict=True)
    ]
    for process in processes:
        process.start()
    return processes, logs[0]


def _launcher_variables(num_processes: int) -> list[dict[str, str]]:
    """Return what `accelerate launch` sets for each process on CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(num_processes)]


def run_to_the_end(stage: str, config: Any, cuts: Iterable[Cut], **launched: Any) -> str:
    """Give the same command until it ends by itself; return the last output. Each cut must happen.

    Args:
        launched: How it is started (see run_command).
    """
    for cut in cuts:
        code, printed = run_command(stage, config, cut, **launched)
        assert code == KILLED, (cut, code, printed[-2000:])
    code, printed = run_command(stage, config, **launched)
    assert code == 0, printed[-2000:]
    return printed


def outcome(folder: Path) -> dict[str, Any]:
    """Return all that a run leaves behind, except times.

    These are the bytes of its weights, its rows, samples and results.
    """
    found: dict[str, Any] = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (folder / name).exists():
            rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
            found[name] = [_without_times(row) for row in rows]
    for name in ("results.json", "reward.json"):
        if (folder / name).exists():
            found[name] = _without_times(json.loads((folder / name).read_text()))
    return found


def _without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in row.items()
        if not is_timing(name) and name not in RESULTS_OF_TIME
    }


def _run(
    stage: str,
    settings: Path,
    log: Path,
    cut: Cut | None,
    variables: dict[str, str],
    launcher: str | None,
) -> None:
    os.environ.update(variables)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if cut is not None:
        _send_at(cut)
    module = importlib.import_module(f"stages.{stage}.train")
    config = importlib.import_module(f"stages.{stage}.config")
    function = module.pretrain if stage == "pretrain" else module.train
    split_weights(WHOLE_BELOW)
    with nullcontext() if launcher is None else launched_as(launcher):
        run_stage(function, config.Config, ["--config", str(settings)])


def _send_at(cut: Cut) -> None:
    module = importlib.import_module(cut.module)
    owner, _, name = cut.function.rpartition(".")
    holder = getattr(module, owner) if owner else module
    original = getattr(holder, name)
    calls = count(1)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if cut.call <= next(calls) < cut.call + cut.times:
            os.kill(os.getpid(), cut.signal)
        return original(*args, **kwargs)

    setattr(holder, name, counted)


def make_configs(inputs: Path, output: Path) -> dict[str, Any]:
    """Make a short run of every stage that carries all it can from step to step."""
    write_inputs(inputs)
    model = ModelSettings(path=str(inputs / "sft"))
    ppo = make_ppo_config(inputs, output / "ppo")
    return {
        "pretrain": PretrainConfig(
            output_dir=str(output / "pretrain"),
            text_path=str(inputs / "text.jsonl"),
            text_held_out_path=str(inputs / "text.jsonl"),
            vocab_size=300,
            block_length=16,
            batch_size=8,
            num_epochs=4,
            architecture=ArchitectureSettings(hidden_size=32, num_hidden_layers=2),
            log_steps=2,
            eval_steps=5,
            checkpoint_every=3,
        ),
        "sft": SFTConfig(
            output_dir=str(output / "sft"),
            model=model,
            demonstrations=str(inputs / "demonstrations.jsonl"),
            text=str(inputs / "text.jsonl"),
            held_out=0.2,
            max_text_tokens=32,
            max_response_tokens=8,
            batch_size=4,
            micro_batch_size=2,
            optim=OptimSettings(learning_rate=3e-3),
            num_samples=2,
            eval_every=2,
            checkpoint_every=3,
        ),
        "rm": RewardModelConfig(
            output_dir=str(output / "rm"),
            model=model,
            rankings=[str(inputs / "rankings.jsonl")],
            held_out=0.25,
            demonstrations=str(inputs / "demonstrations.jsonl"),
            batch_size=4,
            num_epochs=2,
            optim=OptimSettings(learning_rate=3e-3, warmup_steps=3),
            checkpoint_every=3,
        ),
        "ppo": replace(
            ppo,
            prompts_held_out=str(inputs / "prompts.jsonl"),
            rollout=RolloutSettings(batch_size=16, max_new_tokens=6),
            ppo=PPOSettings(
                mini_batch_size=8,
                num_epochs=2,
                kl_target=1.0,
                kl_horizon=64,
                value_warmup_updates=1,
            ),
            ptx=PtxSettings(
                coef=0.5, text=str(inputs / "text.jsonl"), block_tokens=16, blocks_per_episode=0.5
            ),
            reward=replace(ppo.reward, normalize_on=32),
            optim=OptimSettings(learning_rate=1e-3, schedule="cosine", warmup_steps=3),
            num_updates=6,
            ema_decay=0.8,
            eval_every=2,
            num_samples=2,
            checkpoint_every=2,
        ),
    }


def write_inputs(folder: Path) -> None:
    """Write a model, prompts, text, 40 rankings of three responses and 40 demonstrations."""
    write_ppo_inputs(folder)
    text = [Text(f"{i} cats sat on {i} mats and sang. " * 2) for i in range(30)]
    generator = random.Random(0)
    answers = ["".join(generator.choices("abcdef", k=1 + i % 5)) for i in range(120)]
    rankings = [Ranking(f"q{i}", tuple(answers[3 * i : 3 * i + 3]), (1, 2, 3)) for i in range(40)]
    write_records(folder / "text.jsonl", text)
    write_records(folder / "rankings.jsonl", rankings)
    demonstrations = [Demonstration(r.prompt, r.responses[0]) for r in rankings]
    write_records(folder / "demonstrations.jsonl", demonstrations)
