"""Run the evaluation: sample, score, compare, report."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rlhf.generation.answers import Answer
from rlhf.generation.engines import check_can_sample_alone
from rlhf.runs.folder import RESULTS, folders_released
from rlhf.runs.run import open_run
from rlhf.training.processes import start_accelerator
from stages.evaluate.best_of import Pool, best_of_curve, best_of_figures
from stages.evaluate.config import REWARD_MODEL, Config
from stages.evaluate.measures import Answers, Scores, compare, gain, score, score_all
from stages.evaluate.other_runs import is_there, read_report, results_of, speed_of
from stages.evaluate.pairs import ScoredResponse, outcomes_by_part, pair_figures
from stages.evaluate.parts import PartsByPrompt, part_names, part_scores
from stages.evaluate.policies import Measurements, makes_pairs, measure_policies
from stages.evaluate.report import format_results, format_samples
from stages.evaluate.setup import Setup, inputs_of, set_up
from stages.evaluate.warnings import EvaluationWarning, Frequent, find_warnings

SAMPLES_SHOWN = "samples.md"


@folders_released()
def evaluate(config: Config) -> None:
    """Measure every policy, write results.json, samples and the page, and print the table."""
    accelerator = start_accelerator()
    check_can_sample_alone(config.generation, accelerator.num_processes)
    run = open_run(
        config,
        stage="evaluate",
        inputs=inputs_of(config),
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
    reports = {name: read_report(folder) for name, folder in config.reports.items()}
    setup = set_up(config, accelerator.device)
    measured = measure_policies(config, setup, accelerator.device)
    scores = score_all(setup.judges, measured.answers)
    figures = _figures(config, measured, scores)
    best_of: dict[str, Any] = {}
    if measured.pool:
        pool = _score_pool(config, setup, measured.pool)
        if makes_pairs(config, setup):
            of_rm = reports.get(REWARD_MODEL, {})
            reports[REWARD_MODEL] = of_rm | _measure_pairs(config, setup, measured.pool, pool)
        if config.best_of is not None:
            best_of = _best_of(config, setup, measured, scores, pool)
    warnings = _find_warnings(config, setup, measured, scores)
    results = _results(config, setup, warnings, {**figures, **best_of, **reports})
    rows = _sample_rows(config, setup, measured, scores)
    run.samples(rows)
    shown = format_samples(rows, results["warnings"], config.num_shown)
    (run.dir / SAMPLES_SHOWN).write_text(shown, encoding="utf-8")
    run.finish(results)
    run.write_page()
    print(format_results(json.loads((run.dir / RESULTS).read_text(encoding="utf-8"))), flush=True)
    for warning in warnings:
        print(f"evaluate: warning {warning.code}: {warning.message}", flush=True)


def _figures(
    config: Config, measured: Measurements, scores: dict[str, dict[str, Scores]]
) -> dict[str, dict[str, Any]]:
    """Return each policy's figures, with its gains over the baseline."""
    lengths = {name: of.lengths for name, of in measured.answers.items()}
    figures = {
        name: of | compare(name, config.baseline_name, scores, lengths, config.seed)
        for name, of in measured.figures.items()
    }
    for name in figures:
        if name != config.baseline_name:
            figures[name] |= _right_gain(config, measured, name)
    return figures


def _results(
    config: Config,
    setup: Setup,
    warnings: Sequence[EvaluationWarning],
    sections: dict[str, Any],
) -> dict[str, Any]:
    """Put results.json together.

    Args:
        sections: The figures of policies, of best-of-n and of other stages, by name.
    """
    stages = {name: folder for name, folder in config.stages.items() if is_there(name, folder)}
    ended = {name: results_of(folder) for name, folder in stages.items()}
    return {
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
        **sections,
        "seconds": {name: one["seconds"] for name, one in ended.items() if "seconds" in one},
        "speed": {name: speed for name, one in ended.items() if (speed := speed_of(one))},
    }


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
