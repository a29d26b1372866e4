"""Load tasks of lm-evaluation-harness, from task files of ours or from its own ones.

A task file has the harness's format, so its program `lm_eval` takes the same file. Two things
differ here. Local data files are read by our readers, which name the row of an error. And where a
task has no split to draw examples from, some questions are held out for that.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager

from stages.benchmark.config import Config, TaskSettings
from stages.benchmark.task_files import PAGE, data_files, find_task_file, read_task_file, rows_of
from stages.benchmark.task_names import unknown_task

SHOTS = "shots"
"""Name of the split that is held out to draw examples from."""


@dataclass(frozen=True)
class LoadedTask:
    """Holds a task of the harness, and where it comes from."""

    name: str
    task: ConfigurableTask
    source: str
    """The task file, or the name of a task of the harness's own."""
    settings_name: str
    """Name of the task in the settings. A group of the harness gives several tasks."""

    @property
    def is_sampled(self) -> bool:
        """Whether a policy answers by writing, not by rating given texts."""
        return bool(self.task.OUTPUT_TYPE == "generate_until")


def load_tasks(config: Config) -> list[LoadedTask]:
    """Load every task of the settings, and check that its examples do not give its answers away.

    Raises:
        ValueError: A task or its data cannot be used; the message names the file and the remedy.
        OSError: A file or a data set of the hub cannot be read.
    """
    loaded = [one for name in config.tasks for one in _load(name, config)]
    names = [one.name for one in loaded]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"tasks gives the task {name} twice; name it once")
    for one in loaded:
        settings = config.tasks[one.settings_name]
        check_shots(one, max(settings.shots))
        if settings.samples > 1:
            _sample_several(one, settings)
    return loaded


def _sample_several(loaded: LoadedTask, settings: TaskSettings) -> None:
    if not loaded.is_sampled:
        raise ValueError(
            f"tasks.{loaded.settings_name}.samples is {settings.samples}, but {loaded.name} rates "
            "given texts and samples nothing; give samples: 1"
        )
    sampling = {"do_sample": True, "temperature": settings.temperature}
    loaded.task.set_config("repeats", settings.samples)
    loaded.task.set_config("generation_kwargs", sampling, update=True)


def question_of(task: ConfigurableTask, row: Mapping[str, Any]) -> str:
    """Return what identifies a question: its text, or the whole row if the choices are texts."""
    text = task.doc_to_text(row)
    return text.strip() if isinstance(text, str) else json.dumps(row, sort_keys=True, default=str)


def check_shots(loaded: LoadedTask, num_shots: int) -> None:
    """Refuse examples that are too few, or that are questions of the test.

    Raises:
        ValueError: The examples of a task cannot be used.
    """
    task = loaded.task
    if num_shots == 0:
        return
    examples = task.fewshot_docs()
    if _draws_from_test(task):  # the harness leaves the tested question out
        _check_number(loaded, num_shots, len(examples) - 1)
        return
    _check_number(loaded, num_shots, len(examples))
    tested = {question_of(task, row): number for number, row in enumerate(task.eval_docs, start=1)}
    for number, row in enumerate(examples, start=1):
        question = question_of(task, row)
        if question in tested:
            raise ValueError(
                f"{loaded.source}: row {number} of the examples asks what row {tested[question]} "
                f"of the test asks: {question[-80:]!r}; remove it from one of them, since a "
                "question that comes with its answer measures nothing"
            )


def _draws_from_test(task: ConfigurableTask) -> bool:
    """Return whether the harness draws examples from the split that it tests."""
    if task.fewshot_cfg.split is None and task.fewshot_cfg.samples is not None:
        return False  # the task file lists its examples
    config = task.config
    source = task.fewshot_cfg.split or config.training_split or config.validation_split
    return source in (None, config.test_split or config.validation_split)


def _check_number(loaded: LoadedTask, num_shots: int, available: int) -> None:
    if num_shots > available:
        raise ValueError(
            f"tasks.{loaded.settings_name}.shots asks for {num_shots} examples, and "
            f"{loaded.source} has {available}; give fewer shots, or more rows in "
            "num_shot_questions or the file"
        )


def _load(name: str, config: Config) -> list[LoadedTask]:
    path = find_task_file(name, config.task_dir)
    if path is None:
        return _load_from_harness(name, config)
    task = _make(path, config, max(config.tasks[name].shots))
    return [LoadedTask(name, task, str(path), name)]


def _load_from_harness(name: str, config: Config) -> list[LoadedTask]:
    manager = TaskManager()
    if name not in manager.all_tasks:
        raise unknown_task(name, config.task_dir, manager.all_tasks)
    try:
        tasks = manager.load([name])["tasks"]
    except OSError as error:  # the hub cannot be reached
        raise OSError(
            f"tasks.{name} reads a data set of the hub, which failed: {error}; {PAGE} tells how "
            "to read local files instead"
        ) from error
    return [LoadedTask(one, task, f"lm_eval: {one}", name) for one, task in tasks.items()]


def _make(path: Path, config: Config, num_shots: int) -> ConfigurableTask:
    """Make the task of a task file, with examples held out if it needs some and names none."""
    settings = read_task_file(path)
    files = data_files(path, settings, config.data_dir)
    if not files:
        return _build(path, settings)
    splits = {split: rows_of(file) for split, file in files.items()}
    task = _build(path, _with_data(settings, splits))
    test = str(settings["test_split"])
    if num_shots == 0 or _has_examples(settings):
        return task
    if num_shots > config.num_shot_questions:
        raise ValueError(
            f"num_shot_questions is {config.num_shot_questions} and tasks.{path.stem}.shots has "
            f"{num_shots}; raise the first"
        )
    held_out = hold_out([question_of(task, row) for row in splits[test]], config.num_shot_questions)
    sides: dict[bool, list[Any]] = {True: [], False: []}
    for row, is_shot in zip(splits[test], held_out, strict=True):
        sides[is_shot].append(row)
    if not sides[False]:
        raise ValueError(
            f"{path}: its test split has {len(splits[test])} rows, so num_shot_questions "
            f"{config.num_shot_questions} leaves no question; lower it"
        )
    halves = {test: sides[False], SHOTS: sides[True]}
    return _build(path, _with_data(settings, halves) | {"fewshot_split": SHOTS})


def hold_out(questions: Sequence[str], num_questions: int) -> list[bool]:
    """Return for each row whether its question is held out: those with the lowest hashes are.

    Rows with the same question go to the same side.
    """
    by_hash = sorted(
        {*questions}, key=lambda question: hashlib.sha256(f"{SHOTS}\n{question}".encode()).digest()
    )
    held_out = {*by_hash[:num_questions]}
    return [question in held_out for question in questions]


def _has_examples(settings: Mapping[str, Any]) -> bool:
    named = [settings.get("fewshot_split"), settings.get("training_split")]
    listed = (settings.get("fewshot_config") or {}).get("samples")
    return bool(listed) or any(split not in (None, settings["test_split"]) for split in named)


def _with_data(settings: Mapping[str, Any], splits: Mapping[str, list[Any]]) -> dict[str, Any]:
    """Return a task's settings with its rows in memory in place of its files."""
    rows = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    )
    return {
        **settings,
        "dataset_kwargs": None,
        "custom_dataset": functools.partial(_rows_for_harness, rows),
    }


def _rows_for_harness(rows: datasets.DatasetDict, **_: object) -> datasets.DatasetDict:
    return rows


def _build(path: Path, settings: dict[str, Any]) -> ConfigurableTask:
    """Let the harness build a task; if it refuses, raise an error that names the file."""
    try:
        task = ConfigurableTask(config=dict(settings))
        task.set_config("custom_dataset", None)  # the harness would copy it into its report
        return task
    except OSError as error:  # the hub cannot be reached
        raise OSError(f"{path} reads a data set of the hub, which failed: {error}") from error
    except Exception as error:  # the harness checks with asserts, KeyErrors and its templates
        raise ValueError(
            f"{path}: lm-evaluation-harness refuses it: {type(error).__name__}: {error}; {PAGE} "
            "shows what a task file holds"
        ) from error
