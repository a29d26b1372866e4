"""`python -m tests.tools.measured_run WARM_UP.yaml SETTINGS.yaml`: prints peak bytes of a PPO run.

The run of the first file imports and starts all libraries. The peak of the second one counts beyond
the memory that is then in use.
"""

import ctypes
import gc
import sys
from pathlib import Path

import peft  # noqa: F401  # the first run would not import it

from rlhf.runs.settings import load_config
from stages.ppo.config import Config
from stages.ppo.train import train


def status(name: str) -> int:
    """Return a size of this process, as the kernel reports it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def main(warm_up: str, settings: str) -> None:
    train(load_config(Config, ["--config", warm_up]))
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak of VmRSS, starts anew
    before = status("VmRSS")
    train(load_config(Config, ["--config", settings]))
    print("peak", status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
