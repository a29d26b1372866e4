"""Read task files and the local data files that they name, without the harness."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf.inputs.files import read_rows
from rlhf.inputs.records import RecordError
from rlhf.rewards.functions import load_function

LOCAL = "json"
"""The dataset_path of a task file whose data are local files."""
PAGE = "docs/benchmark_tasks.md"


def find_task_file(name: str, task_dir: str) -> Path | None:
    """Return the file of a task; None if it must be a task of the harness."""
    path = Path(task_dir) / f"{name}.yaml"
    return path if path.is_file() else None


def read_task_file(path: Path) -> dict[str, Any]:
    """Read the settings of one task; its `!function package.module.name` becomes that function.

    Raises:
        ValueError: The file is not a task file.
    """
    try:
        settings = _TaskLoader(path.read_text(encoding="utf-8")).get_single_data()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is not a task file: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or "task" not in settings:
        raise ValueError(f"{path} has no key task; {PAGE} shows what a task file holds")
    if settings["task"] != path.stem:
        raise ValueError(
            f"{path} names its task {settings['task']!r}; give it the name of the file, {path.stem}"
        )
    if not settings.get("test_split"):
        raise ValueError(
            f"{path} has no test_split; name the split that holds the questions, such as "
            "test_split: test"
        )
    return settings


class _TaskLoader(yaml.SafeLoader):
    """Reads YAML, and imports what `!function` names."""


def _construct_function(loader: yaml.SafeLoader, node: yaml.Node) -> Callable[..., Any]:
    assert isinstance(node, yaml.ScalarNode)
    module, _, name = str(loader.construct_scalar(node)).rpartition(".")
    return load_function(f"{module}:{name}")


_TaskLoader.add_constructor("!function", _construct_function)


def data_files(path: Path, settings: Mapping[str, Any], data_dir: str | None) -> dict[str, Path]:
    """Return the local data file of each split; none if the task reads a data set of the hub."""
    if settings.get("dataset_path") != LOCAL:
        return {}
    where = settings.get("dataset_kwargs") or {}
    files = where.get("data_files")
    if not isinstance(files, dict) or not files:
        raise ValueError(
            f"{path}: dataset_kwargs.data_files is {files!r}; give a file for each split, such as "
            "{test: questions.jsonl}"
        )
    folder = Path(data_dir if data_dir is not None else where.get("data_dir", "."))
    found = {str(split): folder / str(name) for split, name in files.items()}
    for split, file in found.items():
        if not file.is_file():
            raise FileNotFoundError(
                f"{path} reads its split {split} from {file}, which does not exist; put it there "
                f"or give data_dir ({PAGE} lists the files)"
            )
    needed = [settings.get(f"{kind}_split") for kind in ("test", "training", "fewshot")]
    for split in filter(None, needed):
        if split not in found:
            raise ValueError(
                f"{path} has no file for its split {split}: dataset_kwargs.data_files names "
                f"{', '.join(found)}; give a file for {split}"
            )
    return found


def rows_of(file: Path) -> list[Any]:
    """Read the rows of a data file; raise a ValueError that names a bad row."""
    rows = []
    for place, row in read_rows(file):
        if isinstance(row, RecordError):
            raise ValueError(f"{place}: {row}")
        if not isinstance(row, dict):
            raise ValueError(f"{place}: found {type(row).__name__}, expected an object; convert it")
        rows.append(row)
    if not rows:
        raise ValueError(f"{file} is empty; a task needs at least one row")
    return rows
