"""python -m stages.pretrain --config configs/pretrain/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.pretrain.config import Config


def run(config: Config) -> None:
    """Import what the stage needs, which takes seconds and so comes after its settings."""
    from stages.pretrain.train import pretrain

    pretrain(config)


if __name__ == "__main__":
    run_stage(run, Config)
