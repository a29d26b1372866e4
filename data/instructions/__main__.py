"""python -m data.instructions --output_dir FOLDER"""

from data.instructions.build import InstructionsConfig, build
from rlhf.runs.program import run_stage

if __name__ == "__main__":
    run_stage(build, InstructionsConfig)
