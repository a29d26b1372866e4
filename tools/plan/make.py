"""Makes the plan of any stage's settings."""

import torch

from rlhf.measuring.allocations import DryRun
from stages.ppo.config import Config as PPOConfig
from stages.rm.config import Config as RMConfig
from stages.sft.config import Config as SFTConfig
from tools.plan.launch import Launch
from tools.plan.ppo import plan_ppo
from tools.plan.record import Plan
from tools.plan.rm import plan_rm
from tools.plan.sft import plan_sft

Config = PPOConfig | RMConfig | SFTConfig
TYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Maps the launcher's mixed precision to the type of autocast."""


def make_plan(config: Config, launch: Launch) -> Plan:
    """Make the plan of a stage's settings.

    Raises:
        ValueError, OSError: A model's config cannot be read, an adapter does not fit the settings,
            weights are to be quantized, or the stage would refuse the launcher.
    """
    if config.lora.rank and config.lora.quantize != "none":
        raise ValueError(
            f"lora.quantize is {config.lora.quantize}, and the plan knows no quantized weights; "
            "give --lora.quantize none for what the run would need without, which is more"
        )
    dry = DryRun(TYPES[launch.mixed_precision])
    try:
        if isinstance(config, PPOConfig):
            config.check_launch(launch.mixed_precision, launch.num_processes)
            return plan_ppo(config, launch, dry)
        if isinstance(config, RMConfig):
            return plan_rm(config, launch, dry)
        return plan_sft(config, launch, dry)
    except (ValueError, OSError):
        raise
    except Exception as error:  # an architecture may fail in any way on tensors without data
        path = config.policy.path if isinstance(config, PPOConfig) else config.model.path
        raise ValueError(
            f"{path} cannot be planned: its architecture cannot be run without data "
            f"({type(error).__name__}: {' '.join(str(error).split())[:150]}); mixtures of experts "
            "and state space models are among these. Try a short run instead: num_updates or "
            "num_epochs 1"
        ) from error
