"""Write a plain model folder from an adapter and its base, or from a checkpoint of PPO."""

from rlhf.runs.program import run_stage
from tools.export.config import Config


def run(config: Config) -> None:
    """Import what an export needs, which takes seconds and so comes after its settings."""
    from tools.export.export import export

    export(config)


if __name__ == "__main__":
    run_stage(run, Config)
