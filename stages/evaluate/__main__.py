"""python -m stages.evaluate --config configs/evaluate/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.evaluate.config import Config


def run(config: Config) -> None:
    """Import what the stage needs, which takes seconds and so comes after its settings."""
    from stages.evaluate.evaluate import evaluate

    evaluate(config)


if __name__ == "__main__":
    run_stage(run, Config)
