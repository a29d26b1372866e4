"""python -m stages.pretrain --config configs/pretrain/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.pretrain.config import Config
from stages.pretrain.train import pretrain

if __name__ == "__main__":
    run_stage(pretrain, Config)
