"""Run the benchmark: check everything, ask every policy every task, compare, report."""

import importlib
import logging
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from rlhf.generation.engines import check_can_sample_alone
from rlhf.inputs.chat import Chat
from rlhf.inputs.whole_files import write_text
from rlhf.models.limits import check_vocabulary
from rlhf.models.loading import load_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import has_chat_template, load_chat
from rlhf.runs.folder import folders_released
from rlhf.runs.run import open_run
from rlhf.training.processes import start_accelerator
from stages.benchmark.config import Config
from stages.benchmark.figures import alignment_tax, figure
from stages.benchmark.report import format_results
from stages.benchmark.task_files import data_files, find_task_file, read_task_file
from stages.benchmark.task_names import HARNESS, check_names

if TYPE_CHECKING:
    from lm_eval.api.model import LM

    from stages.benchmark.answers import Outcome, TaskVariant
    from stages.benchmark.tasks import LoadedTask

TABLES = "benchmark.md"


@folders_released()
def benchmark(config: Config) -> None:
    """Measure every policy on every task, write results.json and tables, and print the tables."""
    accelerator = start_accelerator()
    check_can_sample_alone(config.generation, accelerator.num_processes)
    run = open_run(config, stage="benchmark", inputs=_inputs(config), files=(TABLES,))
    if not accelerator.is_main_process:
        return
    _require_harness()
    check_names(config.tasks, config.task_dir)
    from stages.benchmark.tasks import load_tasks

    chats = {name: load_chat(_settings(config, name)) for name in config.policies}
    _check_chat_templates(config)
    tasks = load_tasks(config)
    outcomes: dict[str, dict[TaskVariant, Outcome]] = {}
    for name in config.policies:
        outcomes[name] = _measure_policy(config, tasks, name, chats[name], accelerator.device)
    results = _results(config, tasks, outcomes)
    run.samples(
        {"policy": name, "task": variant.task, "rendering": variant.rendering}
        | {"shots": variant.shots, **row}
        for name, by_variant in outcomes.items()
        for variant, outcome in by_variant.items()
        for row in outcome.rows
    )
    shown = format_results(results)
    write_text(run.dir / TABLES, shown)
    run.finish(results)
    print(shown, flush=True)


def _require_harness() -> None:
    """Refuse to run without lm-evaluation-harness, and keep what it logs off the screen."""
    try:
        importlib.import_module(HARNESS)
    except ImportError as error:
        raise ValueError(
            f"the tasks need the package {HARNESS} ({error}); install it with "
            "`pip install -c constraints.txt -e '.[eval]'`"
        ) from error
    logging.getLogger(HARNESS).setLevel(logging.ERROR)


def _inputs(config: Config) -> dict[str, str]:
    """Return what is read: policies, task files, and the local data files that these name."""
    inputs = {f"policies.{name}": path for name, path in config.policies.items()}
    for name in config.tasks:
        path = find_task_file(name, config.task_dir)
        if path is not None:
            files = data_files(path, read_task_file(path), config.data_dir)
            inputs[f"tasks.{name}"] = str(path)
            inputs |= {f"tasks.{name}.{split}": str(file) for split, file in files.items()}
    return inputs


def _check_chat_templates(config: Config) -> None:
    """Refuse the chat rendering for a policy whose files have no chat template.

    Other stages give such a policy a template of ours, which it has never seen.
    """
    asked = [name for name, task in config.tasks.items() if "chat" in task.renderings]
    for name in config.policies:
        if (
            asked
            and name not in config.plain_only
            and not has_chat_template(_settings(config, name))
        ):
            raise ValueError(
                f"tasks.{asked[0]}.renderings has chat, but policy {name} at "
                f"{config.policies[name]} has no chat template; give plain_only: [{name}], or "
                "renderings: [plain]"
            )


def _settings(config: Config, name: str) -> ModelSettings:
    return ModelSettings(
        path=config.policies[name],
        dtype=config.dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )


def _measure_policy(
    config: Config, tasks: "list[LoadedTask]", name: str, chat: Chat, device: torch.device
) -> "dict[TaskVariant, Outcome]":
    """Measure one policy on all tasks, with no other policy in memory."""
    from stages.benchmark.answers import ask_questions

    policy = load_policy(_settings(config, name))
    check_vocabulary(policy, chat, config.policies[name])
    policy.to(device)  # type: ignore[arg-type]  # its wrapper hides the types of Module.to
    lm = _make_lm(config, policy, chat)
    outcomes = {}
    for loaded, variant in _all_variants(config, tasks, name):
        started = time.monotonic()
        settings = config.tasks[loaded.settings_name]
        outcomes[variant] = ask_questions(
            lm, loaded, variant, settings, limit=config.limit, seed=config.seed
        )
        print(
            f"benchmark: {name} answered {variant.task}, {variant.rendering}, {variant.shots} "
            f"shots, in {time.monotonic() - started:.1f} s",
            flush=True,
        )
    return outcomes


def _all_variants(
    config: Config, tasks: "list[LoadedTask]", name: str
) -> "Iterator[tuple[LoadedTask, TaskVariant]]":
    from stages.benchmark.answers import variants_of

    for loaded in tasks:
        for variant in variants_of(loaded, config.tasks[loaded.settings_name]):
            if variant.rendering == "plain" or name not in config.plain_only:
                yield loaded, variant


def _make_lm(config: Config, policy: Any, chat: Chat) -> "LM":
    if config.engine == "hflm":
        from lm_eval.models.huggingface import HFLM

        return HFLM(policy, tokenizer=chat.tokenizer, batch_size=config.generation.batch_size)
    from stages.benchmark.packed import PackedLM

    return PackedLM(
        policy,
        chat,
        micro_batch_tokens=config.micro_batch_tokens,
        generation=config.generation,
    )


def _results(
    config: Config,
    tasks: "list[LoadedTask]",
    outcomes: "dict[str, dict[TaskVariant, Outcome]]",
) -> dict[str, Any]:
    """Compute figures by policy and task variant, and differences from the baselines."""
    from stages.benchmark.answers import metric_of

    figures: list[dict[str, Any]] = []
    taxes: list[dict[str, Any]] = []
    described: dict[str, dict[str, Any]] = {}
    for loaded in tasks:
        metrics: dict[str, Any] = {}
        for variant, by_policy in _by_variant(loaded.name, outcomes):
            for key in next(iter(by_policy.values())).values:
                metric = metric_of(loaded.task, key)
                values = {name: outcome.values[key] for name, outcome in by_policy.items()}
                place = {**asdict(variant), "metric": key}
                figures += [
                    {"policy": name, **place, **figure(of_policy, metric, config.seed)}
                    for name, of_policy in values.items()
                ]
                compared = alignment_tax(values, config.baseline_names, metric, config.seed)
                taxes += [{**place, **row} for row in compared]
                metrics[key] = {"higher_is_better": metric.higher_is_better}
                described[loaded.name] = {
                    "source": loaded.source,
                    "questions": len(next(iter(values.values()))),
                    "metrics": metrics,
                }
    return {
        "policies": list(config.policies),
        "baselines": config.baseline_names,
        "engine": config.engine,
        "tasks": described,
        "figures": figures,
        "tax": taxes,
        "cpu_seconds": [
            {"policy": name, **asdict(variant), "seconds": outcome.cpu_seconds}
            for name, by_variant in outcomes.items()
            for variant, outcome in by_variant.items()
        ],
    }


def _by_variant(
    task: str, outcomes: "dict[str, dict[TaskVariant, Outcome]]"
) -> "Iterator[tuple[TaskVariant, dict[str, Outcome]]]":
    """Yield each variant of a task with the outcomes of the policies measured in it."""
    variants = dict.fromkeys(
        variant for of_policy in outcomes.values() for variant in of_policy if variant.task == task
    )
    for variant in variants:
        yield (
            variant,
            {name: found[variant] for name, found in outcomes.items() if variant in found},
        )
