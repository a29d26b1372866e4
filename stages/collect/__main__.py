"""python -m stages.collect --config configs/collect/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.collect.config import Config


def run(config: Config) -> None:
    """Import what the stage needs, which takes seconds and so comes after its settings."""
    from stages.collect.collect import collect

    collect(config)


if __name__ == "__main__":
    run_stage(run, Config)
