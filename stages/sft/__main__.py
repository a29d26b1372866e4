"""`python -m stages.sft --config configs/sft/tiny.yaml`: fine-tunes a policy on demonstrations."""

from rlhf.runs.program import run_stage
from stages.sft.config import Config
from stages.sft.train import train

if __name__ == "__main__":
    run_stage(train, Config)
