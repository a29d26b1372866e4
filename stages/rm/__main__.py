"""python -m stages.rm --config configs/rm/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.rm.config import Config


def run(config: Config) -> None:
    """Import what the stage needs, which takes seconds and so comes after its settings."""
    from stages.rm.train import train

    train(config)


if __name__ == "__main__":
    run_stage(run, Config)
