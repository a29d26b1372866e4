"""Runs SFT, a reward model, and PPO with ptx under PPO's own stop rules.

`accelerate launch --config_file FILE -m tests.device.chain FOLDER` prints the device and the
precision at work.
"""

import json
import sys
from pathlib import Path

from rlhf.training.processes import start_accelerator
from stages.ppo.config import MonitorSettings
from stages.ppo.train import train as train_ppo
from stages.rm.train import train as train_rm
from stages.sft.train import train as train_sft
from tests.distributed.chain import make_inputs, ppo_settings, rm_settings, sft_settings

STOP_RULES = MonitorSettings(min_eos_rate=0.0)
"""The default rules, except for ends: a random model seldom ends its responses."""


def main(folder: Path) -> None:
    make_inputs(folder)
    sft, rm = folder / "sft", folder / "rm"
    train_sft(sft_settings(folder, sft))
    train_rm(rm_settings(folder, sft, rm))
    train_ppo(ppo_settings(folder, sft, rm, folder / "ppo", monitor=STOP_RULES))
    accelerator = start_accelerator()
    print(json.dumps([accelerator.device.type, accelerator.mixed_precision]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
