"""python -m stages.benchmark --config configs/benchmark/smollm2.yaml"""

from rlhf.runs.program import run_stage
from stages.benchmark.benchmark import benchmark
from stages.benchmark.config import Config


def main() -> None:
    run_stage(benchmark, Config)


if __name__ == "__main__":
    main()
