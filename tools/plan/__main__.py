"""python -m tools.plan --config FILE [--accelerate FILE] [--gpu_gib N] [--KEY VALUE]..."""

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from rlhf.runs.program import run_stage
from rlhf.runs.settings import config_files
from stages.ppo.config import Config as PPOConfig
from stages.rm.config import Config as RMConfig
from stages.sft.config import Config as SFTConfig

STAGES: dict[str, Any] = {"ppo": PPOConfig, "rm": RMConfig, "sft": SFTConfig}


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage="python -m tools.plan --config FILE [--accelerate FILE] [--gpu_gib N] "
        "[--KEY VALUE]...",
        description="Memory and time that a run will need; other options are the stage's own.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("--stage", choices=STAGES)
    parser.add_argument("--accelerate", type=lambda path: Path(os.path.expanduser(path)))
    parser.add_argument(
        "--gpu_gib",
        type=float,
        metavar="N",
        help="memory of a GPU in GiB, if this machine has another one or none; vLLM takes a share",
    )
    own, words = parser.parse_known_args(args)
    if not words or words == ["--help"]:
        parser.print_help()
        parser.exit()

    def tell(config: Any) -> None:
        print(_plan_of(config, own.accelerate, own.gpu_gib), flush=True)

    run_stage(tell, STAGES[own.stage or _stage_of(words)], words)


def _plan_of(config: Any, accelerate: Path | None, gpu_gib: float | None) -> str:
    """Import what a plan needs, which takes seconds and so comes after its settings."""
    import torch

    from rlhf.runs.stopwatch import matrix_rate
    from tools.plan.launch import Launch
    from tools.plan.make import TYPES, make_plan
    from tools.plan.table import show

    has_gpu = torch.cuda.is_available()
    gpu_bytes = torch.cuda.mem_get_info()[1] if has_gpu else None
    if gpu_gib is not None:
        gpu_bytes = int(gpu_gib * 2**30)
    launch = replace(Launch.read(accelerate), gpu_bytes=gpu_bytes)
    plan = make_plan(config, launch)
    model = config.policy if isinstance(config, PPOConfig) else config.model
    dtype = TYPES[launch.mixed_precision] or getattr(torch, model.dtype)
    device = torch.device("cuda" if launch.device == "cuda" and has_gpu else "cpu")
    return show(plan, matrix_rate(device, dtype), dtype, psutil.virtual_memory().total)


def _stage_of(words: Sequence[str]) -> str:
    """Guess the stage by the keys that only one stage's settings have."""
    given = {
        word.removeprefix("--").split("=")[0].split(".")[0] for word in words if word[:2] == "--"
    }
    for path in config_files(words):
        with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):  # load_config names it
            settings = yaml.safe_load(path.read_text(encoding="utf-8"))
            given |= set(settings) if isinstance(settings, dict) else set()
    return "ppo" if "policy" in given else "rm" if "rankings" in given else "sft"


if __name__ == "__main__":
    main()
