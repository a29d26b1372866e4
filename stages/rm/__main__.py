"""python -m stages.rm --config configs/rm/tiny.yaml"""

from rlhf.runs.program import run_stage
from stages.rm.config import Config
from stages.rm.train import train


def main() -> None:
    run_stage(train, Config)


if __name__ == "__main__":
    main()
