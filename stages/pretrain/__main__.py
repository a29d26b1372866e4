"""`python -m stages.pretrain --config FILE`."""

from rlhf.cli import run_stage
from stages.pretrain.config import PretrainConfig
from stages.pretrain.train import pretrain

if __name__ == "__main__":
    run_stage(pretrain, PretrainConfig)
