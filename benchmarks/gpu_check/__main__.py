"""python -m benchmarks.gpu_check [--smoke] [--model FOLDER] [--parts noise,rows]

This program answers what only a GPU can answer, in at most nine minutes, without a network.
Without a GPU it says what it skipped. After every part it writes gpu_check.json and gpu_check.md.
The exit code is 1 if a part failed, otherwise 0.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_check.parts import PARTS, TOTAL_SECONDS
from benchmarks.gpu_check.records import PAGE, Record, write_results
from benchmarks.gpu_check.runner import run_parts

OUTPUT_DIR = Path("runs/gpu_check")


def main(args: Sequence[str] | None = None) -> int:
    options = _options(args)
    folder: Path = options.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []

    def emit(record: Record) -> None:
        records.append(record)
        write_results(records, folder)
        reason = f": {record.reason}" if record.reason else ""
        print(f"{record.name} {record.status} in {record.seconds:.0f} s{reason}", flush=True)

    arguments = ["--smoke"] * options.smoke
    arguments += ["--model", options.model] if options.model else []
    parts = [part for part in PARTS if part.name in options.parts]
    started = time.monotonic()
    run_parts(parts, folder, arguments, seconds=TOTAL_SECONDS, emit=emit)
    print(f"gpu-check: wrote {folder / PAGE} in {time.monotonic() - started:.0f} s")
    return int(any(record.status == "failed" for record in records))


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description="What only a GPU can settle, in at most nine minutes.",
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model and little work, also on a CPU"
    )
    parser.add_argument(
        "--model", help="folder of a trained policy; a random Llama is made otherwise"
    )
    parser.add_argument(
        "--parts",
        type=lambda text: text.split(","),
        default=names,
        help=f"comma-separated, of {','.join(names)}; all by default",
    )
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help="folder of the page")
    options = parser.parse_args(args)
    unknown = sorted(set(options.parts) - set(names))
    if unknown:
        parser.error(f"no part {', '.join(unknown)}; there are {', '.join(names)}")
    return options


if __name__ == "__main__":
    sys.exit(main())
