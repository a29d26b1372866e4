"""Run the evaluation: sample, score, compare, report."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf.generation.answers import Answer
from rlhf.generation.engines import check_can_sample_alone
from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records
from rlhf.inputs.fitting import FittedPrompts, fit_prompts
from rlhf.inputs.packing import Packer, PromptTree, text_tree
from rlhf.inputs.records import Prompt, Text, naming_row
from rlhf.inputs.streams import python_stream, torch_stream
from rlhf.measuring.fact_recall import fact_recall
from rlhf.models.layout import packer_for
from rlhf.models.limits import check_vocabulary
from rlhf.models.loading import load_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.functions import FunctionReward, load_function
from rlhf.rewards.load import load_reward_model_for_policy
from rlhf.rewards.models import measured_dtype
from rlhf.rewards.rendering import same_rendering
from rlhf.rewards.scores import Reward
from rlhf.runs.folder import RESULTS, folders_released
from rlhf.runs.run import open_run
from rlhf.training.processes import start_accelerator
from stages.evaluate.best_of import Pool, best_of_curve, best_of_figures
from stages.evaluate.config import GOLD, REWARD_MODEL, Config
from stages.evaluate.measures import (
    Answers,
    Scores,
    compare,
    describe,
    estimate_kl,
    gain,
    most_frequent_response,
    response_logprobs,
    sample,
    score,
    text_loss,
)
from stages.evaluate.pairs import ScoredResponse, outcomes_by_part, pair_figures
from stages.evaluate.parts import (
    Grader,
    PartsByPrompt,
    describe_parts,
    find_grader,
    part_names,
    part_scores,
)
from stages.evaluate.report import format_results, format_samples
from stages.evaluate.warnings import EvaluationWarning, Frequent, find_warnings

SAMPLES_SHOWN = "samples.md"

_FUNCTION = re.compile(r"\w+(\.\w+)*:\w+")
"""Matches package.module:name."""


@dataclass(frozen=True)
class Setup:
    """Holds what is the same for every policy: the questions, and the judges."""

    chat: Chat
    """The baseline's chat, whose rendering all policies share."""
    chats: dict[str, Chat]
    """The chat of each policy, with the end tokens that its own files declare."""
    prompts: FittedPrompts[Prompt]
    texts: list[PromptTree]
    probes: list[Prompt]
    judges: dict[str, Reward]
    """Maps names to judges: "gold" and "rm" if they are given, then those of the settings. The
    first one decides the win rates."""
    grader: Grader | None
    """Gives the parts of gold. None means that there is no gold, or that it has no parts."""
    kinds: list[str] | None
    """Kind of each question. None means that gold does not give kinds."""


@dataclass(frozen=True)
class Measurements:
    """Holds the policies' answers, and what was measured while each policy was in memory."""

    answers: dict[str, Answers] = field(default_factory=dict)
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    parts: dict[str, PartsByPrompt] = field(default_factory=dict)
    """Parts of gold for each policy's answers; empty without a grader."""
    pool: list[list[Answer]] = field(default_factory=list)
    """Several answers of the baseline to each prompt, for pairs and for best-of-n; empty if neither
    is wanted."""


@folders_released()
def evaluate(config: Config) -> None:
    """Measure every policy, write results.json, samples and the page, and print the table."""
    accelerator = start_accelerator()
    check_can_sample_alone(config.generation, accelerator.num_processes)
    run = open_run(
        config,
        stage="evaluate",
        inputs=_inputs(config),
        files=(SAMPLES_SHOWN,),
        is_shared=True,
    )
    if not accelerator.is_main_process:
        return
    if accelerator.num_processes > 1:  # happens when all stages get the same launcher file
        print(
            f"evaluate: the first of {accelerator.num_processes} processes does all the work, the "
            "others are done; start one only to save them",
            flush=True,
        )
    reports = {name: _read_report(folder) for name, folder in config.reports.items()}
    setup = _prepare(config, accelerator.device)
    measured = _measure_policies(config, setup, accelerator.device)
    scores = {
        judge: {name: score(reward, of) for name, of in measured.answers.items()}
        for judge, reward in setup.judges.items()
    }
    lengths = {name: of.lengths for name, of in measured.answers.items()}
    figures = {
        name: of | compare(name, config.baseline_name, scores, lengths, config.seed)
        for name, of in measured.figures.items()
    }
    for name in figures:
        if name != config.baseline_name:
            figures[name] |= _right_gain(config, measured, name)
    best_of: dict[str, Any] = {}
    if measured.pool:
        pool = _score_pool(config, setup, measured.pool)
        if _makes_pairs(config, setup):
            of_rm = reports.get(REWARD_MODEL, {})
            reports[REWARD_MODEL] = of_rm | _measure_pairs(config, setup, measured.pool, pool)
        if config.best_of is not None:
            best_of = _best_of(config, setup, measured, scores, pool)
    warnings = _find_warnings(config, setup, measured, scores)
    stages = {name: folder for name, folder in config.stages.items() if _is_there(name, folder)}
    ended = {name: _results_of(folder) for name, folder in stages.items()}
    results: dict[str, Any] = {
        "policies": list(config.policies),
        "baseline": config.baseline_name,
        "judge": next(iter(setup.judges), None),
        "judges": list(setup.judges),
        "prompts": {
            "used": len(setup.prompts.kept),
            "cut": setup.prompts.num_cut,
            "dropped": len(setup.prompts.dropped),
            "samples_per_prompt": config.samples_per_prompt,
            "temperature": config.temperature,
        },
        "warnings": [asdict(warning) for warning in warnings],
        **{name: figures[name] for name in config.policies},
        **best_of,
        **reports,
        "seconds": {name: one["seconds"] for name, one in ended.items() if "seconds" in one},
        "speed": {name: speed for name, one in ended.items() if (speed := _speed_of(one))},
    }
    rows = _sample_rows(config, setup, measured, scores)
    run.samples(rows)
    shown = format_samples(rows, results["warnings"], config.num_shown)
    (run.dir / SAMPLES_SHOWN).write_text(shown, encoding="utf-8")
    run.finish(results)
    run.write_page()
    print(format_results(json.loads((run.dir / RESULTS).read_text(encoding="utf-8"))), flush=True)
    for warning in warnings:
        print(f"evaluate: warning {warning.code}: {warning.message}", flush=True)


def _inputs(config: Config) -> dict[str, str]:
    """Return the inputs that must exist, and the files of other runs whose figures are shown."""
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
        **{f"judges.{n}": judge for n, judge in config.judges.items() if not _is_function(judge)},
        **{f"reports.{name}": path for name, path in config.reports.items()},
        **{
            f"{section}.{name}.{RESULTS}": str(Path(folder) / RESULTS)
            for section in ("reports", "stages")
            for name, folder in getattr(config, section).items()
            if (Path(folder) / RESULTS).is_file()
        },
    }


def _prepare(config: Config, device: torch.device) -> Setup:
    """Load prompts, texts and judges, so that faults in them are found before any sampling."""
    chats = _common_chats(config)
    chat = chats[config.baseline_name]
    prompts = fit_prompts(_draw_prompts(config), chat, config.max_prompt_tokens)
    _check_prompts(config, prompts)
    texts: list[PromptTree] = []
    probes: list[Prompt] = []
    if config.held_out_text is not None:
        records = read_records(config.held_out_text, Text, limit=config.num_texts)
        ids = [_text_ids(record, chat)[: config.max_text_tokens] for record in records]
        texts = [text_tree(document) for document in ids if len(document) > 1]
    if config.fact_probe is not None:
        probes = read_records(config.fact_probe, Prompt)
    gold = _load_gold(config)
    grader = find_grader(gold, config.gold or GOLD)
    return Setup(
        chat,
        chats,
        prompts,
        texts,
        probes,
        judges=_load_judges(config, gold, chat, device),
        grader=grader,
        kinds=None if grader is None else grader.kinds([prompt.record for prompt in prompts.kept]),
    )


def _text_ids(record: Text, chat: Chat) -> list[int]:
    with naming_row(record):
        return chat.text_ids(record.text)


def _common_chats(config: Config) -> dict[str, Chat]:
    """Load every policy's chat, and check that all render as the baseline does.

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
    return chats


def _draw_prompts(config: Config) -> list[Prompt]:
    """Read all prompts, or draw as many as are wanted, in the order of the file."""
    records = read_records(config.prompts, Prompt)
    if len(records) <= config.num_prompts:
        return records
    draw = python_stream(config.seed, "evaluate/prompts")
    drawn = draw.sample(range(len(records)), k=config.num_prompts)
    return [records[i] for i in sorted(drawn)]


def _check_prompts(config: Config, prompts: FittedPrompts[Prompt]) -> None:
    """Print how many prompts did not fit; raise a ValueError if too few did."""
    limit = f"max_prompt_tokens {config.max_prompt_tokens}"
    prompts.check_dropped(limit, config.max_dropped)
    text = prompts.describe(limit)
    if text is not None:
        print(f"evaluate: {text}")
    if len(prompts.kept) < 2:
        raise ValueError(
            f"{config.prompts}: {len(prompts.kept)} of {prompts.num_read} prompts fit {limit}, and "
            "an evaluation needs 2; raise it or give more prompts"
        )


def _load_gold(config: Config) -> Callable[..., Any] | None:
    if config.gold is None:
        return None
    arguments = () if config.gold_path is None else (config.gold_path,)
    return load_function(config.gold)(*arguments)


def _load_judges(
    config: Config, gold: Callable[..., Any] | None, chat: Chat, device: torch.device
) -> dict[str, Reward]:
    def load_model(path: str) -> Reward:
        return load_reward_model_for_policy(
            ModelSettings(
                path=path,
                dtype=measured_dtype(path),
                attention=config.attention,
                trust_remote_code=config.trust_remote_code,
            ),
            chat,
            micro_batch_tokens=config.micro_batch_tokens,
            device=device,
            allow_chance_reward=config.allow_chance_reward,
        )

    judges: dict[str, Reward] = {}
    if gold is not None:
        assert config.gold is not None
        judges[GOLD] = _gold_reward(gold, config.gold)
    if config.reward_model is not None:
        judges[REWARD_MODEL] = load_model(config.reward_model)
    for name, judge in config.judges.items():
        is_function = _is_function(judge)
        judges[name] = (
            FunctionReward(load_function(judge), judge) if is_function else load_model(judge)
        )
    return judges


def _is_function(judge: str) -> bool:
    """Return whether an entry of `judges` is package.module:name, and not a folder or hub id."""
    return _FUNCTION.fullmatch(judge) is not None and not Path(judge).exists()


def _gold_reward(gold: Callable[..., list[float]], name: str) -> Reward:
    return FunctionReward(lambda prompts, responses, metas: gold(prompts, responses), name)


def _measure_policies(config: Config, setup: Setup, device: torch.device) -> Measurements:
    """Collect the answers and figures of each policy, with one policy in memory at a time.

    The baseline comes last, so that it can compute the log-probabilities of all other answers.
    """
    baseline = config.baseline_name
    others = [name for name in config.policies if name != baseline]
    answers: dict[str, Answers] = {}
    measured = Measurements(answers)
    for name in [*others, baseline]:
        started = time.monotonic()
        policy = _load(config, setup, name)
        policy.to(device)  # type: ignore[arg-type]  # its wrapper hides the types of Module.to
        packer = packer_for(policy, config.micro_batch_tokens)
        answers[name] = _answer(config, setup, policy, packer, name)
        text, share = most_frequent_response(answers[name])
        figures = measured.figures[name] = {
            **describe(answers[name]),
            "most_frequent_response": {"text": text, "share": share},
        }
        if setup.grader is not None:
            measured.parts[name] = setup.grader.grade(answers[name].by_prompt)
            figures |= _measure_parts(
                config, setup, setup.grader, policy, name, measured.parts[name]
            )
        if setup.texts:
            label = f"{name} reads held-out text"
            figures["text_loss"] = text_loss(policy, setup.texts, packer, label)
        if setup.probes:
            figures["fact_recall"] = fact_recall(policy, setup.chat.tokenizer, setup.probes)
        if name == baseline:
            for other in others:
                trees, label = answers[other].trees, f"{name} reads {other}"
                ref_logprobs = response_logprobs(policy, trees, packer, config.temperature, label)
                measured.figures[other] |= estimate_kl(answers[other], ref_logprobs)
            if _makes_pairs(config, setup) or config.best_of is not None:
                measured.pool.extend(_sample_pool(config, setup, policy, name))
        del policy
        print(f"evaluate: measured {name} in {time.monotonic() - started:.1f} s", flush=True)
    return measured


def _measure_parts(
    config: Config,
    setup: Setup,
    grader: Grader,
    policy: PreTrainedModel,
    name: str,
    parts: PartsByPrompt,
) -> dict[str, Any]:
    """Describe the parts of the answers; if gold says what is right, also of greedy answers."""
    figures = describe_parts(parts, config.right_part, setup.kinds, config.seed)
    if "right" in figures:
        label = f"{name} answers greedily"
        chat = setup.chats[name]
        answers = _sample(config, setup, policy, chat, label, num_samples=1, temperature=0.0)
        greedy = grader.grade(answers)
        of_greedy = describe_parts(greedy, config.right_part, None, config.seed)
        figures["right_greedy"] = of_greedy["right"]
        figures["right_greedy_interval"] = of_greedy["right_interval"]
    return figures


def _makes_pairs(config: Config, setup: Setup) -> bool:
    """Return whether to test the reward model on pairs that differ in one part of gold."""
    is_judged = setup.grader is not None and REWARD_MODEL in setup.judges
    return is_judged and config.pair_samples_per_prompt > 0


def _sample_pool(
    config: Config, setup: Setup, policy: PreTrainedModel, name: str
) -> list[list[Answer]]:
    """Sample answers other than those that the policies are compared on."""
    for_pairs = config.pair_samples_per_prompt if _makes_pairs(config, setup) else 0
    for_best = config.best_of_samples or config.best_of or 0
    return _sample(
        config,
        setup,
        policy,
        setup.chats[name],
        f"{name} answers several times",
        num_samples=max(for_pairs, for_best),
        temperature=config.temperature,
        stream="evaluate/pairs",
    )


def _score_pool(config: Config, setup: Setup, pool: list[list[Answer]]) -> Pool:
    """Let the judges score the pool: all of them for best-of-n, the reward model for pairs."""
    names = list(setup.judges) if config.best_of is not None else [REWARD_MODEL]
    answers = Answers(pool, [])
    return Pool(
        scores={name: score(setup.judges[name], answers) for name in names},
        tokens=answers.lengths,
        parts=None if setup.grader is None else setup.grader.grade(pool),
    )


def _measure_pairs(
    config: Config, setup: Setup, answers: list[list[Answer]], pool: Pool
) -> dict[str, Any]:
    """Measure the reward model on pairs of the pool that differ in one part only."""
    assert pool.parts is not None
    scored = [
        [
            ScoredResponse(answer.text, of_answer, value)
            for answer, of_answer, value in zip(group, of_parts, of_scores, strict=True)
        ][: config.pair_samples_per_prompt]
        for group, of_parts, of_scores in zip(
            answers, pool.parts, pool.scores[REWARD_MODEL], strict=True
        )
    ]
    right_part = _right_part(config, pool.parts)
    return pair_figures(outcomes_by_part(scored), right_part, setup.kinds, config.seed)


def _right_part(config: Config, parts: PartsByPrompt) -> str | None:
    """Return the part that says what is right, or None if gold does not give it."""
    return config.right_part if config.right_part in part_names(parts) else None


def _right_gain(config: Config, measured: Measurements, name: str) -> dict[str, Any]:
    """Compute how many more of a policy's responses are right than of the baseline's."""
    baseline = config.baseline_name
    right = _right_part(config, measured.parts[baseline]) if measured.parts else None
    if right is None:
        return {}
    own, base = (part_scores(measured.parts[policy], right) for policy in (name, baseline))
    return gain("right", own, base, baseline, config.seed)


def _best_of(
    config: Config,
    setup: Setup,
    measured: Measurements,
    scores: dict[str, dict[str, Scores]],
    pool: Pool,
) -> dict[str, Any]:
    """Return the entries of results.json about best-of-n: what it is, and its figures."""
    assert config.best_of is not None
    baseline, judge = config.baseline_name, config.best_of_judge
    part = None if pool.parts is None else _right_part(config, pool.parts)
    right = None if part is None else (part, part_scores(measured.parts[baseline], part))
    return {
        "best_of": {
            "name": config.best_of_name,
            "n": config.best_of,
            "policy": baseline,
            "judge": judge,
            "samples_per_prompt": len(pool.tokens[0]),
            "by_n": best_of_curve(pool, config.best_of, judge),
        },
        config.best_of_name: best_of_figures(
            pool,
            config.best_of,
            judge,
            baseline,
            {name: of[baseline] for name, of in scores.items()},
            right=right,
            kinds=setup.kinds,
            seed=config.seed,
        ),
    }


def _find_warnings(
    config: Config, setup: Setup, measured: Measurements, scores: dict[str, dict[str, Scores]]
) -> list[EvaluationWarning]:
    return find_warnings(
        config.policies_after_baseline,
        config.baseline_name,
        scores=scores,
        lengths={name: of.lengths for name, of in measured.answers.items()},
        parts=measured.parts,
        right_part=config.right_part,
        frequent={
            name: Frequent(**figures["most_frequent_response"])
            for name, figures in measured.figures.items()
        },
        num_prompts=len({prompt.record.key for prompt in setup.prompts.kept}),
        seed=config.seed,
    )


def _answer(
    config: Config, setup: Setup, policy: PreTrainedModel, packer: Packer, name: str
) -> Answers:
    num_samples, temperature = config.samples_per_prompt, config.temperature
    label = f"{name} answers"
    drawn = _sample(
        config,
        setup,
        policy,
        setup.chats[name],
        label,
        num_samples=num_samples,
        temperature=temperature,
    )
    answers = Answers(drawn, [])
    label = f"{name} reads its answers"
    logprobs = response_logprobs(policy, answers.trees, packer, temperature, label)
    return replace(answers, logprobs=logprobs)


def _sample(
    config: Config,
    setup: Setup,
    policy: PreTrainedModel,
    chat: Chat,
    label: str,
    *,
    num_samples: int,
    temperature: float,
    stream: str = "evaluate/answers",
) -> list[list[Answer]]:
    """Sample answers to all prompts, with the draws of one stream."""
    return sample(
        policy,
        setup.prompts.kept,
        chat,
        config.generation,
        samples_per_prompt=num_samples,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        generator=torch_stream(config.seed, stream),
        label=label,
    )


def _settings(config: Config, name: str) -> ModelSettings:
    return ModelSettings(
        path=config.policies[name],
        dtype=config.dtype,
        attention=config.attention,
        trust_remote_code=config.trust_remote_code,
    )


def _load(config: Config, setup: Setup, name: str) -> PreTrainedModel:
    """Load a policy; raise a ValueError if it cannot read these prompts and responses."""
    path = config.policies[name]
    policy = load_policy(_settings(config, name))
    check_vocabulary(policy, setup.chat, path)
    context = getattr(policy.config.get_text_config(), "max_position_embeddings", None)
    needed = {
        "max_prompt_tokens + max_new_tokens": config.max_prompt_tokens + config.max_new_tokens,
        "max_text_tokens": config.max_text_tokens if setup.texts else 0,
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
        print(f"evaluate: no stage {name} at {folder}; its seconds are left out")
    return there


def _read_report(folder: str) -> dict[str, Any]:
    """Read a stage's results without its seconds, which are shown with those of all stages."""
    path = Path(folder)
    path = path / RESULTS if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{folder} has no {RESULTS}, so its run is not complete; run it again")
    results = json.loads(path.read_text(encoding="utf-8"))
    return {key: value for key, value in results.items() if key != "seconds"}


def _results_of(folder: str) -> dict[str, Any]:
    """Read a stage's results; empty if the stage has not finished."""
    path = Path(folder) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _speed_of(results: dict[str, Any]) -> dict[str, Any]:
    """Select tokens a second, FLOPs and seconds by phase, if the stage measures them."""
    names = ("tokens_per_second", "model_flops_utilisation", "phase_seconds")
    return {name: results[name] for name in names if name in results}


def _sample_rows(
    config: Config, setup: Setup, measured: Measurements, scores: dict[str, dict[str, Scores]]
) -> list[dict[str, Any]]:
    """Make one row for each response, sorted by prompt and then by policy."""
    rows = []
    for number, prompt in enumerate(setup.prompts.kept):
        for name in config.policies:
            for i, answer in enumerate(measured.answers[name].by_prompt[number]):
                parts = measured.parts[name][number][i] if measured.parts else None
                rows.append(
                    {
                        "prompt_number": number,
                        "prompt": prompt.record.prompt,
                        "policy": name,
                        "response": answer.text,
                        "finished": answer.is_finished,
                        **{judge: scores[judge][name][number][i] for judge in scores},
                        **({} if parts is None else {"parts": parts}),
                    }
                )
    return rows
