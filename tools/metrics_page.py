"""Write docs/metrics.md from the stages' tables of metrics and alarms.

python -m tools.metrics_page [--output FILE]
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf.inputs.whole_files import write_text
from rlhf.runs.glossary import Metric
from stages.evaluate import glossary as evaluate
from stages.evaluate.warnings import MIN_PROMPTS
from stages.ppo import glossary as ppo
from stages.ppo.config import MonitorSettings
from stages.pretrain import glossary as pretrain
from stages.rm import glossary as rm
from stages.sft import glossary as sft

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "metrics.md"
USER_ERROR = 2
GLOSSARIES = {
    "ppo": ppo.METRICS,
    "seconds": ppo.SECONDS,
    "rm": rm.METRICS,
    "sft": sft.METRICS,
    "pretrain": pretrain.METRICS,
}
"""Tables of the page: each maps the first word of its metrics' names to the metrics."""
CODE = re.compile(r"`[^`]*`|[A-Za-z]\w*(?:[./]\w+)+|[A-Za-z]+(?:_\w+)+")
"""Matches names of metrics, settings, alarms and files in a text, and what is already code."""


def main(args: Sequence[str] | None = None) -> int:
    """Write the page; return 2 for what the user can fix, otherwise 0."""
    parser = argparse.ArgumentParser(description="Write docs/metrics.md from the stages' tables.")
    parser.add_argument("--output", type=Path, default=PAGE, help="file to write")
    output: Path = parser.parse_args(args).output
    try:
        write_text(output, render())
    except OSError as error:
        print(f"error: {error}; name another file with --output", file=sys.stderr)
        return USER_ERROR
    print(f"metrics_page: wrote {output}")
    return 0


def render() -> str:
    """Return the page in Markdown."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"marked": marked, "healthy": healthy}
    return environment.get_template("metrics_page.md.jinja").render(
        metrics=GLOSSARIES,
        alarms=ppo.ALARMS,
        warnings=evaluate.ALARMS,
        stopping=MonitorSettings().stop_on,
        min_prompts=MIN_PROMPTS,
    )


def marked(text: str) -> str:
    """Mark names in a cell of a table as code, so that Markdown shows them as they are."""
    return CODE.sub(lambda found: f"`{found[0].strip('`')}`", text)


def healthy(metric: Metric) -> str:
    """Describe a metric in healthy runs: first its range, then words."""
    parts = [metric.healthy] if metric.healthy else []
    if metric.healthy_range is not None:
        low, high = metric.healthy_range
        parts.insert(0, f"{low:g} to {high:g}")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())
