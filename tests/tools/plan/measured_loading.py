"""Measures the host memory of two processes under FSDP2 while PPO's models load.

    accelerate launch --config_file configs/accelerate/cpu2.yaml \\
        -m tests.tools.plan.measured_loading

The processes take the settings of configs/accelerate/fsdp2.yaml (tests/distributed/gpu_files.py).
They load a policy of 78 million weights, a value model on its body and the reference, and read all
weights. Then the program stops, before FSDP2 splits the models. Memory is the largest sum of the
processes' proportional set sizes (Pss in smaps_rollup), beyond that before. A page that two
processes map counts a half in each.

Each line has the type of the files, whether each process converts them or the machine once, the MB
measured, and the MB that the plan says where the machine converts them once.
"""

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoModelForCausalLM

from rlhf.models.one_copy import converted_once
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat, load_tokenizer
from rlhf.runs.stopwatch import Stopwatch
from rlhf.training import sharding
from rlhf.training.processes import start_accelerator
from stages.ppo import load
from stages.ppo.config import Config
from tests.distributed.gpu_files import launched_as
from tests.tools.plan.inputs import SMALL, run_config, write_inputs
from tools.plan.launch import Launch
from tools.plan.make import make_plan

SIZE: dict[str, Any] = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 6}
TYPES = ("bfloat16", "float32")
PAUSE = 0.02
"""Seconds between two looks at the memory."""


class AllLoaded(Exception):
    """Ends the loading before the models are split."""


def peak_while(work: Callable[[], None], accelerator: Accelerator) -> int:
    """Return the peak of all processes together while they work, beyond what they held before."""
    processes = gather_object([os.getpid()])
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    accelerator.wait_for_everyone()
    before, peak = memory_of(processes), 0
    is_done = threading.Event()

    def look() -> None:
        nonlocal peak
        while not is_done.wait(PAUSE):
            peak = max(peak, memory_of(processes))

    looking = threading.Thread(target=look)
    looking.start()
    work()
    peak = max(peak, memory_of(processes))
    is_done.set()
    looking.join()
    accelerator.wait_for_everyone()  # each process keeps its models until all have looked
    return peak - before


def memory_of(processes: list[int]) -> int:
    """Return the bytes of these processes together."""
    total = 0
    for process in processes:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
        (line,) = (line for line in lines if line.startswith("Pss:"))
        total += 1024 * int(line.split()[1])
    return total


def load_and_read(config: Config, accelerator: Accelerator, held: list[Any]) -> None:
    """Load PPO's models as the stage does, and read their weights until all processes have."""

    def stop(_: Accelerator, model: torch.nn.Module, *__: object) -> None:
        held.append(model)
        raise AllLoaded

    make_reference = load.load_policy

    def note_and_load(*arguments: Any, **options: Any) -> Any:
        held.append(make_reference(*arguments, **options))
        return held[-1]

    chat = load_chat(config.policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "prepare", stop)
        patch.setattr(load, "load_policy", note_and_load)
        with pytest.raises(AllLoaded):
            load.load_models(config, chat, accelerator, Stopwatch(accelerator.device))
    for model in held:
        for weight in model.parameters():
            weight.detach().view(torch.uint8).max()
    accelerator.wait_for_everyone()


def measure(folder: Path, dtype: str, is_once: bool, accelerator: Accelerator) -> tuple[int, int]:
    """Return the bytes measured, and those of the plan."""
    config = run_config(folder, folder / "run", policy=ModelSettings(path=str(folder / dtype)))
    held: list[Any] = []
    with converted_once(accelerator) if is_once else nullcontext():
        measured = peak_while(lambda: load_and_read(config, accelerator, held), accelerator)
    launch = Launch(accelerator.num_processes, mixed_precision="bf16", is_fsdp=True)
    return measured, make_plan(config, launch).loading.peak(accelerator.num_processes)


def write_models(folder: Path, **size: Any) -> None:
    """Write inputs, and the policy in each of TYPES."""
    write_inputs(folder, **size)
    policy = AutoModelForCausalLM.from_pretrained(folder / "sft")
    for dtype in TYPES:
        tokenizer = load_tokenizer(str(folder / "sft"))
        save_policy(policy.to(getattr(torch, dtype)), tokenizer, folder / dtype)


def main() -> None:
    with launched_as("fsdp2"), TemporaryDirectory() as own:
        accelerator = start_accelerator()
        folder = Path(broadcast_object_list([own])[0])
        if accelerator.is_main_process:
            write_models(folder / "small", **SMALL)
            write_models(folder / "large", **SIZE)
        accelerator.wait_for_everyone()
        for name in ("small", "large"):  # the first loading imports what is not imported yet
            for dtype in TYPES:
                for is_once in (False, True):
                    found, planned = measure(folder / name, dtype, is_once, accelerator)
                    if accelerator.is_main_process and name == "large":
                        way = "once" if is_once else "each"
                        print(dtype, way, round(found / 1e6), round(planned / 1e6), flush=True)
        accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
