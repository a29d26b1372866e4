"""python -m benchmarks [--quick] [--rows rm_k9,ppo_fp32] [--threads 2]

This program runs our stages and TRL's RewardTrainer and PPOTrainer alternately, on the same weights
and data. `make bench` makes the environment of the peers first. The results go to
benchmarks/results/results.json and results.md. --quick runs one pair of smaller samples. Results of
--quick, or of --shape with a smaller model, go below runs/benchmarks.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.compare import compare
from benchmarks.folders import SHAPES, VOCAB_SIZES, policy_folder, reward_folder
from benchmarks.report import TABLE, TARGETS, write
from benchmarks.workload import DType, Workload, every, ppo_prompts, rm_data, spread_lengths
from rlhf.runs.lineage import commit

WORK_DIR = Path("runs/benchmarks")
RESULTS_DIR = Path("benchmarks/results")
PEERS_PYTHON = Path(".venv-peers/bin/python")

REAL = "135M"
"""Shape of the model in the published table."""
NUM_PAIRS = 5
PROMPT_TOKENS, RESPONSE_TOKENS = 200, 60
RM_PROMPTS = {9: 1, 4: 4, 2: 8}
"""Maps K to the prompts of a sample. On two cores a prompt of K = 9 takes TRL one to two
minutes."""
RM_MICRO_BATCH = {9: 4, 4: 3, 2: 1}
"""Maps K to the pairs in a pass of RewardTrainer."""
RM_MICRO_BATCH_TOKENS = {9: 900, 4: 900, 2: 512}
"""Maps K to the tokens in our pass. They hold one prompt of K = 9, two of K = 4, or one of
K = 2."""
NUM_PROMPTS, SHORTEST_PROMPT, LONGEST_PROMPT, NEW_TOKENS = 16, 16, 128, 48
PPO_MICRO_BATCH = 4
"""Sequences in a pass of PPOTrainer."""
MICRO_BATCH_TOKENS = 512
"""Tokens in our pass of PPO. On a CPU, 1024 and 2048 are as fast and need more memory."""


def main(args: Sequence[str] | None = None) -> None:
    options = _options(args)
    if not PEERS_PYTHON.exists():
        sys.exit(f"error: {PEERS_PYTHON} does not exist; make bench makes it")
    started = time.monotonic()
    is_real = not options.quick and options.shape == REAL
    folder = RESULTS_DIR if is_real else WORK_DIR / f"quick-{options.shape}"
    dtype, reason = machine.best_dtype()
    for name in options.rows:
        work = workload(name, dtype, quick=options.quick, shape=options.shape)
        if work.kind == "ppo":
            work = replace(work, micro_batch=options.ppo_micro_batch)
        if name == "ppo_best" and work.dtype == "float32" and "ppo_fp32" in options.rows:
            row = _as_best(folder, reason)
        else:
            row = _measure(work, options)
        write([row], folder)
        print((folder / TABLE).read_text(encoding="utf-8"), flush=True)
    print(f"bench: wrote {folder} in {time.monotonic() - started:.0f} s")


def workload(name: str, best: DType, *, quick: bool = False, shape: str = REAL) -> Workload:
    """Make the workload of a row; with `quick`, samples are smaller but have the same shapes."""
    policy = policy_folder(WORK_DIR, shape)
    folders: dict[str, Any] = {
        "name": name,
        "policy": str(policy),
        "reward_model": str(reward_folder(policy, WORK_DIR)),
    }
    vocab_size = VOCAB_SIZES[shape]
    if name.startswith("rm_k"):
        k = int(name.removeprefix("rm_k"))
        prompts, responses = rm_data(
            num_prompts=1 if quick else RM_PROMPTS[k],
            k=k,
            prompt_tokens=PROMPT_TOKENS,
            response_tokens=RESPONSE_TOKENS,
            vocab_size=vocab_size,
        )
        return Workload(
            **folders,
            kind="rm",
            prompts=prompts,
            responses=responses,
            micro_batch=RM_MICRO_BATCH[k],
            micro_batch_tokens=RM_MICRO_BATCH_TOKENS[k],
        )
    count = NUM_PROMPTS // 4 if quick else NUM_PROMPTS
    lengths = spread_lengths(count, SHORTEST_PROMPT, LONGEST_PROMPT)
    work = Workload(
        **folders,
        kind="ppo",
        prompts=ppo_prompts(lengths=lengths, vocab_size=vocab_size),
        new_tokens=NEW_TOKENS // 2 if quick else NEW_TOKENS,
        micro_batch=PPO_MICRO_BATCH,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
    )
    if name == "ppo_eos":
        return replace(work, end_positions=every(work.new_tokens, LONGEST_PROMPT))
    return replace(work, dtype=best) if name == "ppo_best" else work


def commands(work: Workload) -> dict[str, list[str]]:
    """Return the commands that start both sides of a row."""
    ours = [sys.executable, "-m", "benchmarks.ours"]
    if work.kind == "rm":
        return {"ours": ours, "theirs": [sys.executable, "-m", "benchmarks.trl_reward"]}
    return {"ours": ours, "theirs": [str(PEERS_PYTHON), "-m", "benchmarks.trl_ppo"]}


def _measure(work: Workload, options: argparse.Namespace) -> dict[str, Any]:
    row = compare(
        work,
        commands(work),
        num_pairs=options.pairs,
        num_threads=options.threads,
        log_dir=WORK_DIR / "logs",
    )
    return row | _circumstances(options)


def _as_best(folder: Path, reason: str) -> dict[str, Any]:
    """Return the row of float32 under the name ppo_best, as float32 is the faster dtype here."""
    rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    (row,) = (row for row in rows if row["name"] == "ppo_fp32")
    note = f"ppo_best is ppo_fp32: float32 is the faster type here; {reason}"
    return row | {"name": "ppo_best", "machine": row["machine"] | {"note": note}}


def _circumstances(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "quick": options.quick,
        "shape": options.shape,
        "machine": machine.describe(options.threads),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Ours against TRL, in time and memory."
    )
    parser.add_argument("--quick", action="store_true", help="one pair of smaller samples")
    parser.add_argument(
        "--rows",
        type=lambda text: text.split(","),
        default=list(TARGETS),
        help=f"comma-separated, of {','.join(TARGETS)}; all by default",
    )
    parser.add_argument(
        "--shape", default=REAL, choices=SHAPES, help="a smaller model, to try the programs"
    )
    parser.add_argument(
        "--ppo_micro_batch",
        type=int,
        default=PPO_MICRO_BATCH,
        help="sequences a pass of PPOTrainer; divides the prompts (16, or 4 if quick)",
    )
    parser.add_argument("--pairs", type=int, help=f"pairs of samples; {NUM_PAIRS}, or 1 if quick")
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of either side; all cores by default"
    )
    options = parser.parse_args(args)
    unknown = set(options.rows) - set(TARGETS)
    if unknown:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(TARGETS)}")
    if options.pairs is None:
        options.pairs = 1 if options.quick else NUM_PAIRS
    return options


if __name__ == "__main__":
    main()
