"""python -m data.convert --format hh --input FILE --output out.jsonl"""

from data.convert.program import ConvertConfig, convert
from rlhf.runs.program import run_stage

if __name__ == "__main__":
    run_stage(convert, ConvertConfig)
