"""python -m stages.ppo --config configs/ppo/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.ppo.config import Config
from stages.ppo.train import train


def main() -> None:
    run_stage(train, Config)


if __name__ == "__main__":
    main()
