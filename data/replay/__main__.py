"""Sample text from a base model, to stand in for its pretraining data."""

from data.replay.config import ReplayConfig
from rlhf.runs.program import run_stage


def run(config: ReplayConfig) -> None:
    """Import what sampling needs, which takes seconds and so comes after its settings."""
    from data.replay.build import build

    build(config)


if __name__ == "__main__":
    run_stage(run, ReplayConfig)
