"""Prints the peak bytes of a stage's run, in one process or in the first of several.

    python -m tests.tools.plan.measured_run STAGE WARM_UP.yaml SETTINGS.yaml [GPU]

accelerate's launcher starts several. The run of the first file imports and starts all libraries.
The peak of the second one counts beyond the memory that is then in use. GPU is the name of a
launcher file for GPUs, whose settings the processes take (tests/distributed/gpu_files.py).
"""

import ctypes
import gc
import importlib
import sys
from contextlib import nullcontext
from pathlib import Path

import peft  # noqa: F401  # the first run would not import it
from accelerate import PartialState

from rlhf.runs.settings import load_config
from tests.distributed.gpu_files import launched_as


def status(name: str) -> int:
    """Return a size of this process, as the kernel reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(stage: str, warm_up: str, settings: str, gpu_file: str = "") -> None:
    config_class = importlib.import_module(f"stages.{stage}.config").Config
    train = importlib.import_module(f"stages.{stage}.train").train
    with launched_as(gpu_file) if gpu_file else nullcontext():
        train(load_config(config_class, ["--config", warm_up]))
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak of VmRSS, starts anew
        before = status("VmRSS")
        train(load_config(config_class, ["--config", settings]))
        if PartialState().is_main_process:
            print("peak", status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
