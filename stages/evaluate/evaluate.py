"""The evaluation: sample, score, compare, report."""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.chat import Chat
from rlhf.config import ModelSettings
from rlhf.datasets import read_records
from rlhf.distributed import start_accelerator
from rlhf.models import check_vocabulary, load_chat, load_policy, packer_for
from rlhf.packing import Packer, PromptTree, text_tree
from rlhf.recall import fact_recall
from rlhf.records import Prompt, Text
from rlhf.rewards import (
    FunctionReward,
    Reward,
    load_function,
    load_judge,
    measured_dtype,
    same_rendering,
)
from rlhf.runs import RESULTS, Run, open_run
from stages.evaluate.config import Config
from stages.evaluate.curves import draw_curves
from stages.evaluate.measures import (
    Answers,
    compare,
    describe,
    divergence,
    response_logprobs,
    sample,
    score,
    text_loss,
)
from stages.evaluate.report import format_results, format_samples

CURVES = "curves.png"
SAMPLES_SHOWN = "samples.md"


@dataclass(frozen=True)
class Exam:
    """What every policy is put through, and who marks it."""

    chat: Chat
    questions: list[Prompt]
    prompt_ids: list[tuple[int, ...]]
    num_cut: int
    """Prompts that lost early turns to fit."""
    num_dropped: int
    """Prompts that did not fit at all."""
    texts: list[PromptTree]
    probes: list[Prompt]
    judges: dict[str, Reward]
    """"gold" and "rm", as far as there are; the first decides."""


def evaluate(config: Config) -> None:
    """Measure every policy, write results.json, samples and curves, print the table."""
    accelerator = start_accelerator()
    if not accelerator.is_main_process:
        return
    if accelerator.num_processes > 1:  # as when one launcher file is given for all stages
        print(
            f"evaluate: the first of {accelerator.num_processes} processes does all the work, the "
            "others are done; start one only to save them",
            flush=True,
        )
    run = open_run(config, stage="evaluate", inputs=_inputs(config))
    reports = {name: _read_report(folder) for name, folder in config.reports.items()}
    exam = _prepare(config, accelerator.device)
    answers, figures = _examine(config, exam, accelerator.device)
    scores = {
        judge: {name: score(reward, exam.questions, exam.chat, answers[name]) for name in answers}
        for judge, reward in exam.judges.items()
    }
    for name in answers:
        figures[name] |= compare(name, config.baseline_name, scores, config.seed)
    stages = {name: folder for name, folder in config.stages.items() if _is_there(name, folder)}
    ended = {name: _results_of(folder) for name, folder in stages.items()}
    results = {
        "policies": list(config.policies),
        "baseline": config.baseline_name,
        "judge": next(iter(exam.judges), None),
        "prompts": {
            "used": len(exam.questions),
            "cut": exam.num_cut,
            "dropped": exam.num_dropped,
            "samples_per_prompt": config.samples_per_prompt,
            "temperature": config.temperature,
        },
        **{name: figures[name] for name in config.policies},
        **reports,
        "seconds": {name: one["seconds"] for name, one in ended.items() if "seconds" in one},
        "speed": {name: speed for name, one in ended.items() if (speed := _speed_of(one))},
    }
    _write(run, config, exam, answers, scores, stages)
    run.finish(results)
    print(format_results(json.loads((run.dir / RESULTS).read_text(encoding="utf-8"))), flush=True)


def _inputs(config: Config) -> dict[str, str]:
    """All that must be there."""
    optional = {
        "reward_model": config.reward_model,
        "gold_path": config.gold_path,
        "held_out_text": config.held_out_text,
        "fact_probe": config.fact_probe,
    }
    return {
        **{f"policies.{name}": path for name, path in config.policies.items()},
        "prompts": config.prompts,
        **{name: path for name, path in optional.items() if path is not None},
        **{f"reports.{name}": path for name, path in config.reports.items()},
    }


def _prepare(config: Config, device: torch.device) -> Exam:
    """What can be wrong with the prompts, texts and judges is found here, before a sample."""
    chat = _common_chat(config)
    drawn = _draw_prompts(config)
    fitted = [chat.fit_prompt(one.prompt, config.max_prompt_tokens) for one in drawn]
    kept = [i for i, ids in enumerate(fitted) if ids is not None]
    prompt_ids = [tuple(ids) for ids in fitted if ids is not None]
    questions = [drawn[i] for i in kept]
    num_cut = sum(
        len(ids) < len(chat.prompt_ids(question.prompt))
        for question, ids in zip(questions, prompt_ids, strict=True)
    )
    num_dropped = len(drawn) - len(kept)
    _check_prompts(config, num_cut, num_dropped, len(drawn))
    texts: list[PromptTree] = []
    probes: list[Prompt] = []
    if config.held_out_text is not None:
        records = read_records(config.held_out_text, Text, limit=config.num_texts)
        ids = [chat.text_ids(record.text)[: config.max_text_tokens] for record in records]
        texts = [text_tree(document) for document in ids if len(document) > 1]
    if config.fact_probe is not None:
        probes = read_records(config.fact_probe, Prompt)
    judges = _load_judges(config, chat, device)
    return Exam(chat, questions, prompt_ids, num_cut, num_dropped, texts, probes, judges)


def _common_chat(config: Config) -> Chat:
    """The baseline's rendering, which all policies must share.

    Raises:
        ValueError: A policy has another tokenizer or chat template.
    """
    chats = {name: load_chat(_settings(config, name)) for name in config.policies}
    baseline = config.baseline_name
    for name, chat in chats.items():
        if not same_rendering(chats[baseline], chat):
            raise ValueError(
                f"policy {name} at {config.policies[name]} has another tokenizer or chat template "
                f"than the baseline {baseline} at {config.policies[baseline]}, so they cannot be "
                "compared token by token; evaluate it in a run of its own"
            )
    return chats[baseline]


def _draw_prompts(config: Config) -> list[Prompt]:
    """All prompts, or as many as are wanted, in the order of the file."""
    records = read_records(config.prompts, Prompt)
    if len(records) <= config.num_prompts:
        return records
    drawn = random.Random(config.seed).sample(range(len(records)), k=config.num_prompts)
    return [records[i] for i in sorted(drawn)]


def _check_prompts(config: Config, num_cut: int, num_dropped: int, num_drawn: int) -> None:
    """Tells what did not fit, and raises ValueError when too little did."""
    limit = f"max_prompt_tokens {config.max_prompt_tokens}"
    if num_cut or num_dropped:
        print(
            f"evaluate: of {num_drawn} prompts, {num_cut} lost early turns and {num_dropped} were "
            f"dropped to fit {limit}"
        )
    if num_drawn - num_dropped < 2:
        raise ValueError(
            f"{config.prompts}: {num_drawn - num_dropped} of {num_drawn} prompts fit {limit}, and "
            "an evaluation needs 2; raise it or give more prompts"
        )


def _load_judges(config: Config, chat: Chat, device: torch.device) -> dict[str, Reward]:
    judges: dict[str, Reward] = {}
    if config.gold is not None:
        arguments = () if config.gold_path is None else (config.gold_path,)
        judges["gold"] = _gold_reward(load_function(config.gold)(*arguments), config.gold)
    if config.reward_model is not None:
        judges["rm"] = load_judge(
            ModelSettings(
                path=config.reward_model,
                dtype=measured_dtype(config.reward_model),
                attention=config.attention,
                trust_remote_code=config.trust_remote_code,
            ),
            chat,
            micro_batch_tokens=config.micro_batch_tokens,
            device=device,
            allow_chance_reward=config.allow_chance_reward,
        )
    return judges


def _gold_reward(gold: Callable[..., list[float]], name: str) -> Reward:
    return FunctionReward(lambda prompts, responses, metas: gold(prompts, responses), name)


def _examine(
    config: Config, exam: Exam, device: torch.device
) -> tuple[dict[str, Answers], dict[str, dict[str, Any]]]:
    """Answers and figures of each policy, one policy in memory at a time.

    The baseline comes last: it is then there to weigh the answers of all others.
    """
    baseline = config.baseline_name
    others = [name for name in config.policies if name != baseline]
    answers: dict[str, Answers] = {}
    figures: dict[str, dict[str, Any]] = {}
    for name in [*others, baseline]:
        started = time.monotonic()
        policy = _load(config, exam, name)
        policy.to(device)  # type: ignore[arg-type]  # its wrapper hides the types of Module.to
        packer = packer_for(policy, config.micro_batch_tokens)
        answers[name] = _answer(config, exam, policy, packer, name)
        figures[name] = describe(answers[name], exam.chat.end_id)
        if exam.texts:
            label = f"{name} reads held-out text"
            figures[name]["text_loss"] = text_loss(policy, exam.texts, packer, label)
        if exam.probes:
            figures[name]["fact_recall"] = fact_recall(policy, exam.chat.tokenizer, exam.probes)
        if name == baseline:
            for other in others:
                trees, label = answers[other].trees, f"{name} reads {other}"
                ref_logprobs = response_logprobs(policy, trees, packer, config.temperature, label)
                figures[other] |= divergence(answers[other], ref_logprobs)
        del policy
        print(f"evaluate: measured {name} in {time.monotonic() - started:.1f} s", flush=True)
    return answers, figures


def _answer(
    config: Config, exam: Exam, policy: PreTrainedModel, packer: Packer, name: str
) -> Answers:
    trees = sample(
        policy,
        exam.prompt_ids,
        config.generation,
        end_id=exam.chat.end_id,
        samples_per_prompt=config.samples_per_prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=config.seed,
        label=f"{name} answers",
    )
    label = f"{name} reads its answers"
    return Answers(trees, response_logprobs(policy, trees, packer, config.temperature, label))


def _settings(config: Config, name: str) -> ModelSettings:
    return ModelSettings(
        path=config.policies[name],
        dtype=config.dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )


def _load(config: Config, exam: Exam, name: str) -> PreTrainedModel:
    """Raises ValueError where the policy cannot read these prompts and responses."""
    path = config.policies[name]
    policy = load_policy(_settings(config, name))
    check_vocabulary(policy, exam.chat, path)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    needed = {
        "max_prompt_tokens + max_new_tokens": config.max_prompt_tokens + config.max_new_tokens,
        "max_text_tokens": config.max_text_tokens if exam.texts else 0,
    }
    for names, tokens in needed.items():
        if context is not None and tokens > context:
            raise ValueError(
                f"{names} is {tokens}, but policy {name} at {path} reads {context} tokens at most; "
                "give fewer"
            )
    return policy


def _is_there(name: str, folder: str) -> bool:
    there = Path(folder).is_dir()
    if not there:
        print(f"evaluate: no stage {name} at {folder}; its seconds and curves are left out")
    return there


def _read_report(folder: str) -> dict[str, Any]:
    """A stage's results, without the seconds, which stand with those of all stages."""
    path = Path(folder)
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{folder} has no {RESULTS}, so its run is not complete; run it again")
    results = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in results.items() if key != "seconds"}


def _results_of(folder: str) -> dict[str, Any]:
    """Empty where the stage has not come to its end."""
    path = Path(folder) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _speed_of(results: dict[str, Any]) -> dict[str, Any]:
    """Tokens a second, FLOPs and seconds by phase, of a stage that measures them."""
    names = ("tokens_per_second", "model_flops_utilisation", "phase_seconds")
    return {name: results[name] for name in names if name in results}


def _write(
    run: Run,
    config: Config,
    exam: Exam,
    answers: dict[str, Answers],
    scores: dict[str, dict[str, list[list[float]]]],
    stages: dict[str, str],
) -> None:
    rows = _sample_rows(config, exam, answers, scores)
    run.samples(rows)
    shown = [row for row in rows if row["prompt_number"] < config.num_shown]
    (run.dir / SAMPLES_SHOWN).write_text(format_samples(shown), encoding="utf-8")
    draw_curves(stages, run.dir / CURVES)


def _sample_rows(
    config: Config,
    exam: Exam,
    answers: dict[str, Answers],
    scores: dict[str, dict[str, list[list[float]]]],
) -> list[dict[str, Any]]:
    """One row a response: prompt after prompt, policies side by side."""
    rows = []
    for number, question in enumerate(exam.questions):
        for name in config.policies:
            responses: Sequence[tuple[int, ...]] = answers[name].trees[number].responses
            for i, response in enumerate(responses):
                rows.append(
                    {
                        "prompt_number": number,
                        "prompt": question.prompt,
                        "policy": name,
                        "response": exam.chat.decode(response),
                        "finished": response[-1] == exam.chat.end_id,
                        **{judge: scores[judge][name][number][i] for judge in scores},
                    }
                )
    return rows
