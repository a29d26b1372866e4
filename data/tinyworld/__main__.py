"""python -m data.tinyworld --output_dir FOLDER --seed 0"""

from data.tinyworld.build import build
from data.tinyworld.config import TinyWorldConfig
from rlhf.runs.program import run_stage

if __name__ == "__main__":
    run_stage(build, TinyWorldConfig)
