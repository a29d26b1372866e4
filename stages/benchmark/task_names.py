"""Refuse names of tasks that lm-evaluation-harness does not have, without parsing its task files.

The harness parses all of them, more than ten thousand, before it knows a single name. But the name
of a task is a whole word in one of the files. So a name that is in no file is not a task, and
reading the files as text shows that. A name that is in a file may still not be a task, which the
harness finds when it loads the task.
"""

import importlib.util
import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches
from pathlib import Path

from stages.benchmark.task_files import PAGE, find_task_file

HARNESS = "lm_eval"
"""The package of lm-evaluation-harness. It takes seconds to import, and is an extra."""
NO_TASK_FILES = {".py", ".pyc", ".md"}
"""Endings of files in the harness's folder of tasks that name no task. Files that task files
include may have any other ending, or none."""
NUM_SUGGESTIONS = 3
"""Most names that a message suggests."""

_NAME_LINE = re.compile(
    r"""^["']?(?:task|group|tag)["']?[ \t]*:[ \t]*["']?([^\s"'#\[\]{},]+)""", re.M
)
"""Matches the line of a file that gives a task, a group or a tag its name."""


def check_names(names: Iterable[str], task_dir: str) -> None:
    """Refuse a name that is neither a task file nor one of the harness's tasks.

    Raises:
        ValueError: There is no such task; the message has the nearest names.
    """
    of_harness = [name for name in names if find_task_file(name, task_dir) is None]
    texts = _harness_texts() if of_harness else []
    for name in of_harness:
        if not any(_has_word(name, text) for text in texts):
            known = {found for text in texts for found in _NAME_LINE.findall(text)}
            raise unknown_task(name, task_dir, known)


def unknown_task(name: str, task_dir: str, known: Collection[str]) -> ValueError:
    """Return the error for the name of an unknown task.

    Args:
        known: Names of the harness's tasks.
    """
    own = [path.stem for path in Path(task_dir).glob("*.yaml")]
    near = get_close_matches(name, sorted({*own, *known}), n=NUM_SUGGESTIONS)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    return ValueError(
        f"tasks.{name}: there is no {Path(task_dir) / name}.yaml, and lm-evaluation-harness has no "
        f"such task; {meant}{PAGE} tells how to write one"
    )


def harness_task_folder() -> Path:
    """Return the folder in which the harness keeps its tasks, without importing the harness."""
    spec = importlib.util.find_spec(HARNESS)
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "tasks"


def _harness_texts() -> list[str]:
    return [
        path.read_text(encoding="utf-8", errors="replace")
        for path in sorted(harness_task_folder().rglob("*"))
        if path.is_file() and path.suffix not in NO_TASK_FILES
    ]


def _has_word(name: str, text: str) -> bool:
    """Return whether a text contains a name as a whole word."""
    return name in text and bool(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text))
