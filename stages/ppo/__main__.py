"""python -m stages.ppo --config configs/ppo/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.ppo.config import Config


def run(config: Config) -> None:
    """Import what the stage needs, which takes seconds and so comes after its settings."""
    from stages.ppo.train import train

    train(config)


if __name__ == "__main__":
    run_stage(run, Config)
