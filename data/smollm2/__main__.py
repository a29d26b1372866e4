"""Prepare real data and real weights for the preset smollm2 from local files."""

from data.smollm2.config import Smollm2Config
from rlhf.runs.program import run_stage


def run(config: Smollm2Config) -> None:
    """Import what the preparation needs, which takes seconds and so comes after its settings."""
    from data.smollm2.prepare import prepare

    prepare(config)


if __name__ == "__main__":
    run_stage(run, Smollm2Config)
