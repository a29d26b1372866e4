"""Writes small run folders as stages leave them, for tests of the page."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from tools.report.panels import PANELS

HOSTILE = (
    '</script><img src=x onerror="window.pwned=1">',
    "<script>window.pwned=1</script>",
    "<svg onload=window.pwned=1>",
    "javascript:window.pwned=1",
    "{{ 7 * 7 }} {% raw %} &lt;b&gt; ]]> --> <!--",
    "\u202eright to left\u202c and \u2066isolated\u2069",
    "nul \x00 bell \x07 escape \x1b[31m",
    "a lone surrogate \ud800 and U+2028 \u2028 here",
    "x" * 100_000,
)
"""Texts that a model might write. The page must show them, and they must do nothing else."""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_stage(
    folder: Path,
    stage: str,
    settings: Mapping[str, Any],
    results: Mapping[str, Any] | None,
    inputs: Mapping[str, Any] | None = None,
) -> None:
    """Write settings, lineage and, for a finished stage, its results."""
    lineage = {
        "stage": stage,
        "inputs": inputs or {},
        "commit": "c0ffee",
        "versions": {"torch": "2"},
    }
    write_json(folder / "lineage.json", lineage)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(settings)), encoding="utf-8")
    if results is not None:
        write_json(folder / "results.json", results)


def inputs_from(run: Path, **folders: str) -> dict[str, Any]:
    """Return inputs as lineage.json has them, each from a folder of the run."""
    hashes = {"model.safetensors": "5b1f8705bf"}
    return {name: {"path": str(run / of), "sha256": hashes} for name, of in folders.items()}


def write_sft(run: Path) -> None:
    results = {"held_out_loss": 0.5071, "base_held_out_loss": 0.6690, "seconds": 34.4}
    write_stage(run / "sft", "sft", {"output_dir": str(run / "sft"), "seed": 0}, results)


def write_rm(run: Path) -> None:
    results = {
        "pair_accuracy": 0.71003,
        "pair_accuracy_interval": [0.68673, 0.73282],
        "length_baseline": 0.55058,
        "length_direction": "shorter wins",
        "calibration_error": 0.02371,
        "log_loss": 0.56594,
        "pairs": 2721,
        "prompts": 173,
        "calibration": [
            {"confidence": 0.55, "accuracy": 0.5625, "pairs": 1300},
            {"confidence": 0.85, "accuracy": "nan", "pairs": 0},
            {"confidence": 0.95, "accuracy": 0.9375, "pairs": 1421},
        ],
        "seconds": 35.0,
    }
    inputs = inputs_from(run, policy="sft", rankings="rankings")
    write_stage(run / "rm", "rm", {"output_dir": str(run / "rm"), "seed": 0}, results, inputs)


def write_collect(run: Path) -> None:
    results = {
        "agreement": 0.74087,
        "agreement_interval": [0.72147, 0.75992],
        "num_overlap": 280,
        "num_rankings": 1400,
        "num_comparisons": 21620,
        "tie_share": 0.10021,
        "num_rankings_by_labeler": {"Ada": 264, "<b>Ben</b>": 290},
        "num_rankings_by_k": {"4": 244, "9": 125},
        "seconds": 26.1,
    }
    settings = {"output_dir": str(run / "rankings")}
    write_stage(run / "rankings", "collect", settings, results, inputs_from(run, policy="sft"))


def write_ppo(
    run: Path,
    *,
    num_updates: int = 24,
    last_update: int = 23,
    kl_coef: float = 0.05,
    alarms: Iterable[Mapping[str, Any]] = (),
) -> Path:
    """Write a PPO run, unfinished if its last update is not the last one of the settings."""
    folder = run / "ppo_ptx"
    settings = {
        "output_dir": str(folder),
        "num_updates": num_updates,
        "ppo": {"kl_coef": kl_coef},
        "monitor": {"max_kl": 2.0, "stop_on": ["PPO_NEG_KL"], "min_eos_rate": 0.5},
        "seed": 0,
    }
    is_finished = last_update == num_updates - 1
    results = {"score": 1.18769, "kl": 1.6155, "alarms": {}, "seconds": 148.8}
    inputs = inputs_from(run, policy="sft", reward_model="rm")
    write_stage(folder, "ppo", settings, results if is_finished else None, inputs)
    rows = [
        {
            "step": i,
            "ppo/score": 0.1 + i / 20,
            "ppo/kl": i / 11,
            "ppo/eos_rate": 1.0,
            "ppo/entropy": "nan" if i == 3 else 1 / (1 + i),
        }
        for i in range(last_update + 1)
    ]
    write_rows(folder / "metrics.jsonl", rows)
    write_rows(folder / "alarms.jsonl", alarms)
    samples = [
        {"step": step, "prompt": "Who?", "response": text, "score": 0.25, "kl": 0.5, "tokens": 3}
        for step, text in ((0, "It is me."), (last_update, "It is you."))
    ]
    write_rows(folder / "samples.jsonl", samples)
    return folder


def write_long_ppo(run: Path, *, num_updates: int, num_samples: int) -> Path:
    """Write a long PPO run that logs what panels show, with an alarm in every tenth update.

    Its KL is a wave with one peak, in its third update; its samples are those of two evaluations.
    """
    alarms = ({"step": i, "code": "PPO_KL", "message": "High."} for i in range(0, num_updates, 10))
    folder = write_ppo(run, num_updates=num_updates, last_update=num_updates - 1, alarms=alarms)
    names = sorted({name for panel in PANELS for name in panel.lines if name.startswith("ppo/")})
    rows = [
        {"step": i, **{name: math.sin(i / 7 + place) for place, name in enumerate(names)}}
        for i in range(num_updates)
    ]
    rows[2]["ppo/kl"] = 9.75
    write_rows(folder / "metrics.jsonl", rows)
    samples = [
        {
            "step": step,
            "prompt": f"What comes after {number}?",
            "response": f"After {number} comes {number + step}, as all of us know. " * 12,
            "score": math.cos(number + step),
            "kl": number / 100,
            "tokens": 120,
        }
        for step in (0, num_updates - 1)
        for number in range(num_samples // 2)
    ]
    write_rows(folder / "samples.jsonl", samples)
    return folder


def policy(right: float, **figures: Any) -> dict[str, Any]:
    return {
        "right": right,
        "right_interval": [right - 0.03125, right + 0.03125],
        "right_by_kind": {"sum": right},
        "text_loss": 0.63286,
        "response_tokens": 9.75,
        "gold_score": 5.5,
        "gold_score_interval": [5.25, 5.75],
        "rm_score": 0.25,
        **figures,
    }


def write_evaluation(run: Path, **changes: Any) -> None:
    """Write an evaluation of sft and ppo_ptx: results, and samples with hostile texts."""
    results = {
        "policies": ["sft", "ppo_ptx"],
        "baseline": "sft",
        "judge": "gold",
        "judges": ["gold", "rm"],
        "prompts": {"used": 9, "samples_per_prompt": 1, "temperature": 1.0},
        "warnings": [],
        "sft": policy(0.56673),
        "ppo_ptx": policy(
            0.83789,
            kl=1.55103,
            kl_error=0.06107,
            gold_gain_vs_sft=1.25391,
            gold_gain_vs_sft_interval=[1.10156, 1.40625],
            gold_gain_at_equal_length_vs_sft=0.92773,
            gold_gain_at_equal_length_vs_sft_interval=[0.74121, 1.11523],
            right_gain_vs_sft=0.27116,
            right_gain_vs_sft_interval=[0.22851, 0.31445],
            win_rate_vs_sft=0.84082,
            win_rate_vs_sft_interval=[0.8125, 0.86621],
            win_rate_vs_sft_by_rm=0.8955,
        ),
        "best_of_8": policy(0.7373, kl=1.20444),
        "best_of": {
            "name": "best_of_8",
            "n": 8,
            "policy": "sft",
            "judge": "rm",
            "samples_per_prompt": 8,
            "by_n": {
                "1": {"kl": 0.0, "gold_score": 4.5, "rm_score": 0.0},
                "8": {"kl": 1.20444, "gold_score": 5.5, "rm_score": 1.0},
            },
        },
        "rm": {"accuracy_by_part": {"polite": 0.91004, "correct": 0.76568}},
        "seconds": {"sft": 34.4, "evaluate": 41.7, "total": 76.1},
    } | changes
    inputs = inputs_from(run, **{"policies.sft": "sft", "policies.ppo_ptx": "ppo_ptx"})
    settings = {"output_dir": str(run), "seed": 0, "num_prompts": 9}
    write_stage(run, "evaluate", settings, results, inputs)
    rows = [
        {
            "prompt_number": number,
            "prompt": text if number % 2 else [{"role": "user", "content": text}],
            "policy": name,
            "response": f"{name} says {text}",
            "finished": number != 1,
            "gold": 2.0 + number,
            "rm": number / 8,
            "parts": {"polite": 0.5},
        }
        for number, text in enumerate(HOSTILE)
        for name in ("sft", "ppo_ptx")
    ]
    write_rows(run / "samples.jsonl", rows)


def write_benchmark(run: Path) -> None:
    """Write a benchmark of sft and ppo_ptx on one task."""
    row = {"task": "arc_easy", "rendering": "plain", "shots": 0, "metric": "acc"}
    results = {
        "policies": ["sft", "ppo_ptx"],
        "baselines": ["sft"],
        "figures": [
            {**row, "policy": "sft", "value": 0.50042, "interval": [0.48031, 0.52053]},
            {**row, "policy": "ppo_ptx", "value": 0.44571, "interval": [0.42573, 0.46569]},
        ],
        "tax": [
            {
                **row,
                "policy": "ppo_ptx",
                "baseline": "sft",
                "difference": -0.05471,
                "interval": [-0.07113, -0.03829],
                "verdict": "worse",
            }
        ],
        "seconds": 95.5,
    }
    settings = {"output_dir": str(run / "benchmark"), "seed": 0}
    write_stage(run / "benchmark", "benchmark", settings, results)


def write_pipeline(run: Path, **changes: Any) -> Path:
    """Write a whole run with its evaluation, whose results may be changed."""
    write_sft(run)
    write_collect(run)
    write_rm(run)
    write_ppo(run)
    write_benchmark(run)
    write_evaluation(run, **changes)
    return run
