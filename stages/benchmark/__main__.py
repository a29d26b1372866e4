"""python -m stages.benchmark --config configs/benchmark/smollm2.yaml"""

from rlhf.runs.program import run_stage
from stages.benchmark.config import Config


def run(config: Config) -> None:
    """Import what the stage needs, which takes seconds and so comes after its settings."""
    from stages.benchmark.benchmark import benchmark

    benchmark(config)


if __name__ == "__main__":
    run_stage(run, Config)
