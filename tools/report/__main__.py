"""python -m tools.report RUN [RUN2 ...]"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.report.folders import RunFolder, read_run
from tools.report.page import write_page

USER_ERROR = 2


def main(args: Sequence[str] | None = None) -> int:
    """Write the page and print where it is; return 2 for what the user can fix, otherwise 0."""
    parser = argparse.ArgumentParser(
        usage="python -m tools.report RUN [RUN2 ...] [--output FILE]",
        description="Write one HTML page about a run, or about runs side by side.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a pipeline or a stage")
    parser.add_argument(
        "--output",
        type=Path,
        help="file to write; by default report.html in the first folder, or report_vs_RUN2.html",
    )
    options = parser.parse_args(args)
    try:
        print(f"report: wrote {write_page(_read_all(options.runs), options.output)}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    return 0


def _read_all(folders: Sequence[str]) -> list[RunFolder]:
    """Read all runs; folders with the same name are told apart by their paths."""
    names = [Path(folder).resolve().name for folder in folders]
    return [
        read_run(folder, number, None if names.count(name) == 1 else folder)
        for number, (folder, name) in enumerate(zip(folders, names, strict=True))
    ]


if __name__ == "__main__":
    sys.exit(main())
