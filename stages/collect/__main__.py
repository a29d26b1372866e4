"""python -m stages.collect --config configs/collect/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.collect.collect import collect
from stages.collect.config import Config

if __name__ == "__main__":
    run_stage(collect, Config)
