"""`python -m stages.sft --config configs/sft/tiny.yaml`: fine-tunes a policy on demonstrations."""

from rlhf.runs.program import run_stage
from stages.sft.config import Config


def run(config: Config) -> None:
    """Import what the stage needs, which takes seconds and so comes after its settings."""
    from stages.sft.train import train

    train(config)


if __name__ == "__main__":
    run_stage(run, Config)
