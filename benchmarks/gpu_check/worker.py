"""python -m benchmarks.gpu_check.worker FOLDER PARTS [--smoke] [--model PATH]

This is the process that `benchmarks.gpu_check.runner` starts. It runs the named parts in their
order, writes a record after every row, and ends after the first part that fails.
"""

import argparse
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_check.parts import PARTS, Part
from benchmarks.gpu_check.records import RECORDS, Emit, Record, Row, Skipped, finite, write_whole
from benchmarks.gpu_check.setting import Setting

Measure = Callable[[Setting, Emit], None]
"""Measures a part."""


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check.worker")
    parser.add_argument("folder", type=Path)
    parser.add_argument("parts", type=lambda text: text.split(","))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--model")
    options = parser.parse_args(args)
    setting = Setting(options.folder / "models", is_smoke=options.smoke, model=options.model)
    for part in (part for part in PARTS if part.name in options.parts):
        record = run_part(part, measure_of, setting, options.folder / RECORDS)
        if record.status == "failed":
            break


def run_part(part: Part, find: Callable[[str], Measure], setting: Setting, folder: Path) -> Record:
    """Run a part, with its record written at the start, after every row, and at the end.

    Args:
        find: Returns the function of a part by its name. Its errors count as the part's.
    """
    started = time.monotonic()
    record = Record(part.name, part.question, "running")

    def keep() -> None:
        nonlocal record
        record = replace(record, seconds=round(time.monotonic() - started, 2))
        write_whole(folder / f"{part.name}.json", record.to_json())

    def emit(row: Row) -> None:
        nonlocal record
        record = replace(record, rows=(*record.rows, finite(row)))
        keep()

    keep()
    try:
        check_device(part, setting)
        find(part.name)(setting, emit)
        record = record.ended("passed")
    except Skipped as reason:
        record = record.ended("skipped", str(reason))
    except Exception as error:  # one part's failure must not lose the others
        traceback.print_exc()
        record = record.ended("failed", f"{type(error).__name__}: {error}")
    keep()
    return record


def check_device(part: Part, setting: Setting) -> None:
    """Raise Skipped if the part needs a GPU and there is none, before its packages are imported."""
    if part.without_gpu == "run":
        return
    import torch

    if torch.cuda.is_available():
        return
    if part.without_gpu == "skip":
        raise Skipped("no CUDA device")
    if not setting.is_smoke:
        raise Skipped("no CUDA device; --smoke tries the code on the CPU with a tiny model")


def measure_of(name: str) -> Measure:
    """Return the function of a part.

    Only that part's module is imported. So a missing package fails the parts that need it, and
    `environment` says what is missing.
    """
    if name == "environment":
        from benchmarks.gpu_check.environment import environment as measure
    elif name == "models":
        from benchmarks.gpu_check.models import models as measure
    elif name == "tests":
        from benchmarks.gpu_check.suite import tests as measure
    elif name == "noise":
        from benchmarks.gpu_check.noise import noise as measure
    elif name == "decoding":
        from benchmarks.gpu_check.decoding import decoding as measure
    elif name == "rows":
        from benchmarks.gpu_check.rows import rows as measure
    elif name == "allocator":
        from benchmarks.gpu_check.memory import allocator as measure
    elif name == "peak":
        from benchmarks.gpu_check.memory import peak as measure
    else:
        assert name == "peers", name
        from benchmarks.gpu_check.peers import peers as measure
    return measure


if __name__ == "__main__":
    main()
