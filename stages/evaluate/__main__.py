"""python -m stages.evaluate --config configs/evaluate/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.evaluate.config import Config
from stages.evaluate.evaluate import evaluate


def main() -> None:
    run_stage(evaluate, Config)


if __name__ == "__main__":
    main()
