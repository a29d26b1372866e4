"""Ask one policy the questions of one task, and collect what the harness measures of each."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import evaluate

from rlhf.inputs.streams import python_stream
from rlhf.measuring.statistics import majority_of_k
from stages.benchmark.config import Rendering, TaskSettings
from stages.benchmark.figures import Metric
from stages.benchmark.tasks import LoadedTask

NO_ANSWER = "[invalid]"
"""Result of the harness's regular expressions on a text without an answer. It does not vote."""
MAJORITY = " maj@"
"""Stands between a metric's name and the number of answers that vote."""
NUM_PROMPTS_SHOWN = 2
"""Questions of each task variant whose whole prompt is kept in samples.jsonl."""


@dataclass(frozen=True)
class TaskVariant:
    """A task with one rendering and one number of shots."""

    task: str
    rendering: Rendering
    shots: int


@dataclass
class Outcome:
    """Holds what was measured of one policy's answers to one task variant."""

    values: dict[str, list[list[Any]]] = field(default_factory=dict)
    """Maps a metric to its values: for each question, one value for each draw or sample."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """One row for each question and draw, for samples.jsonl."""
    cpu_seconds: float = 0.0
    """CPU time of the process, summed over its threads."""


def variants_of(loaded: LoadedTask, settings: TaskSettings) -> Iterator[TaskVariant]:
    """Yield every rendering of a task with every number of shots, in the order of the settings."""
    for rendering in settings.renderings:
        for shots in settings.shots:
            yield TaskVariant(loaded.name, rendering, shots)


def ask_questions(
    lm: LM,
    loaded: LoadedTask,
    variant: TaskVariant,
    settings: TaskSettings,
    *,
    limit: int | None,
    seed: int,
) -> Outcome:
    """Ask a policy the questions of one task variant.

    Every policy gets the same examples, and samples with the same seeds.
    """
    outcome = Outcome()
    task = loaded.task
    task.set_config("num_fewshot", variant.shots)
    started = time.process_time()
    for draw in range(settings.draws if variant.shots else 1):
        task.set_fewshot_seed(python_stream(seed, f"benchmark/shots/{draw}").getrandbits(32))
        name = f"benchmark/{variant.task}/{variant.rendering}/{variant.shots}/{draw}"
        torch.manual_seed(python_stream(seed, name).getrandbits(32))
        results = evaluate(
            lm=lm,
            task_dict={"tasks": {loaded.name: task}},
            limit=limit,
            bootstrap_iters=0,
            apply_chat_template=variant.rendering == "chat",
            fewshot_as_multiturn=True,
        )
        assert results is not None
        _collect(outcome, results["samples"][loaded.name], draw)
    if settings.samples > 1:
        outcome.values = majority_values(task, settings.samples)
    outcome.cpu_seconds = time.process_time() - started
    return outcome


def majority_values(task: ConfigurableTask, num_samples: int) -> dict[str, list[list[Any]]]:
    """Return each metric's values by question: one for each sample, and those of majorities.

    `METRIC maj@k` is the chance that the majority of k of the samples is right (Wang et al. 2022,
    self-consistency). Every sample is scored by the task's own filters and metrics.
    """
    responses = [list(instance.resps) for instance in task.instances]
    values: dict[str, list[list[Any]]] = {}
    answers: dict[str, list[list[str | None]]] = {}
    for sample in range(num_samples):
        for instance, of_question in zip(task.instances, responses, strict=True):
            instance.resps = [of_question[sample]]
        task.apply_filters()
        for number, instance in enumerate(task.instances):
            for name, answer in instance.filtered_resps.items():
                for metric, value in task.process_results(instance.doc, [answer]).items():
                    key = key_of(metric, name)
                    _at(values, key, number).append(value)
                    _at(answers, key, number).append(None if answer == NO_ANSWER else str(answer))
    for key in list(values):
        for k in majority_sizes(num_samples):
            values[f"{key}{MAJORITY}{k}"] = [
                [majority_of_k(of_answers, of_values, k)]
                for of_answers, of_values in zip(answers[key], values[key], strict=True)
            ]
    return values


def majority_sizes(num_samples: int) -> list[int]:
    """Return how many answers vote: 4, 8, 16 and so on, and all. Two answers have no majority."""
    sizes = {2**power for power in range(2, num_samples.bit_length())}
    return sorted({*sizes, num_samples})


def key_of(metric: str, name_of_filter: str) -> str:
    """Return the name of a metric in the results, with its filter if the task has named ones."""
    return metric if name_of_filter == "none" else f"{metric},{name_of_filter}"


def metric_of(task: ConfigurableTask, key: str) -> Metric:
    """Return how a task aggregates the metric of this name in the results."""
    name = key.partition(MAJORITY)[0].partition(",")[0]
    aggregate = task.aggregation()[name]
    is_mean = aggregate is mean or MAJORITY in key
    return Metric(bool(task.higher_is_better()[name]), None if is_mean else aggregate)


def _collect(outcome: Outcome, samples: Sequence[dict[str, Any]], draw: int) -> None:
    """Add what the harness logged for one draw; it logs a question once for each filter."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        number = int(sample["doc_id"])
        row = rows.setdefault(
            number,
            {
                "draw": draw,
                "question": number,
                "responses": [one for of_request in sample["resps"] for one in of_request],
                "target": sample["target"],
            },
        )
        if number < NUM_PROMPTS_SHOWN:
            row["prompt"] = sample["arguments"][0][0]
        for metric in sample["metrics"]:
            key = key_of(metric, sample["filter"])
            _at(outcome.values, key, number).append(sample[metric])
            row[key] = sample[metric]
    outcome.rows += rows.values()


def _at(values: dict[str, list[list[Any]]], key: str, number: int) -> list[Any]:
    """Return the values of a question, as an empty list if the question is the next one."""
    of_key = values.setdefault(key, [])
    if number == len(of_key):
        of_key.append([])
    return of_key[number]
