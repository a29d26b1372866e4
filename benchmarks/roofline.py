"""python -m benchmarks.roofline [--threads 2]

This program measures what the machine can do, and how close each phase of a PPO update and of a
reward model step comes to it. A phase needs its FLOPs (rlhf.measuring.flops) and the bytes that it
cannot avoid moving. The least time for both is its limit:

    limit = max(FLOPs / best matrix rate, bytes / memory bandwidth)

The bytes are the weights, once a pass (in sampling, once a token). In the optimizer's step they are
weights, gradients and moments. Activations are left out, so no phase can quite reach its limit.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks import machine
from benchmarks.__main__ import WORK_DIR, commands, workload
from benchmarks.compare import median_phases
from benchmarks.protocol import Worker
from benchmarks.workload import Workload
from experiments.tables import markdown_table
from rlhf.inputs.packing import PromptTree
from rlhf.measuring.flops import ModelSize, Work, size_of, training_flops, update_flops, work_of
from rlhf.runs.lineage import commit

OUTPUT = "roofline"
FLOAT_BYTES = 4
ADAM_ARRAYS = 9
"""Weight-sized arrays that a step reads or writes. The norm and the clip read the gradient, and the
clip writes it. AdamW reads weight, gradient and both moments, and writes all but the gradient."""

CAUSES = {
    "rollout": "one token a row and pass: products too thin for the matrix rate, and a fixed cost "
    "of some microseconds for each of the hundreds of operations of a pass",
    "train": "what is not a matrix product: norms, activations, rotary embeddings, softmax and the "
    "attention mask, each of which reads and writes memory; logits made twice to save memory",
    "gradient": "what is not a matrix product: norms, activations, rotary embeddings, softmax and "
    "the attention mask, each of which reads and writes memory",
    "step": "the optimizer's passes over weights, gradients and moments, one after another",
    "logprobs": "entropy and variance of whole distributions beside the log-probability",
}
OTHER_CAUSE = "operations between the matrix products, which read and write memory"


@dataclass(frozen=True)
class Phase:
    """Holds a phase, what it needs and how long it took."""

    name: str
    seconds: float
    flops: float
    num_bytes: float

    def limit(self, rate: float, bandwidth: float) -> float:
        """Return the least seconds at these FLOP/s and bytes/s."""
        return max(self.flops / rate, self.num_bytes / bandwidth)


def main(args: Sequence[str] | None = None) -> None:
    options = _options(args)
    torch.set_num_threads(options.threads)
    rates = {name: machine.matrix_rate(*shape) for name, shape in shapes().items()}
    best_rate, bandwidth = max(rates.values()), machine.memory_bandwidth()
    found: dict[str, Any] = {
        "machine": machine.describe(options.threads),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "matrix_rates": rates,
        "bandwidth": bandwidth,
        "programs": {},
    }
    text = _machine_text(rates, bandwidth)
    for name in ("ppo_fp32", "rm_k9"):
        work = workload(name, "float32", quick=options.quick)
        phases = phases_of(work, _median_phases(work, options.threads, options.samples))
        table, rows = describe(name, phases, best_rate, bandwidth)
        text += table
        found["programs"][name] = rows
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    body = json.dumps(found, indent=1) + "\n"
    (options.output / f"{OUTPUT}.json").write_text(body, encoding="utf-8")
    (options.output / f"{OUTPUT}.md").write_text(text, encoding="utf-8")


def shapes() -> dict[str, tuple[int, int, int]]:
    """Return (rows, inner, columns) of SmolLM2-135M's products and of a large square, by name."""
    return {
        "square 2048": (2048, 2048, 2048),
        "up, 1024 tokens": (1024, 576, 1536),
        "down, 1024 tokens": (1024, 1536, 576),
        "query, 1024 tokens": (1024, 576, 576),
        "logits, 512 tokens": (512, 576, 49152),
        "up, 16 tokens": (16, 576, 1536),
        "logits, 16 tokens": (16, 576, 49152),
    }


def phases_of(work: Workload, seconds: Mapping[str, float]) -> list[Phase]:
    """Compute FLOPs and bytes of the phases that took these seconds."""
    policy, scalar = (
        size_of(_on_meta(path, auto_class))
        for path, auto_class in (
            (work.policy, AutoModelForCausalLM),
            (work.reward_model, AutoModelForSequenceClassification),
        )
    )
    if work.kind == "rm":
        flops, num_bytes = _rm_needs(work, scalar, num_embeddings=policy.unembedding)
    else:
        flops, num_bytes = _ppo_needs(work, policy, scalar)
    return [
        Phase(name, value, flops.get(name, 0.0), num_bytes.get(name, 0.0))
        for name, value in seconds.items()
        if value > 0
    ]


def describe(
    name: str, phases: Sequence[Phase], rate: float, bandwidth: float
) -> tuple[str, list[dict[str, Any]]]:
    """Format the table of a program with its largest gap in words; also return its rows."""
    limits = [phase.limit(rate, bandwidth) for phase in phases]
    cells, rows = [], []
    for phase, limit in zip(phases, limits, strict=True):
        rows.append({**asdict(phase), "limit": limit, "share_of_limit": limit / phase.seconds})
        cells.append(
            [
                phase.name,
                f"{phase.seconds:.2f}",
                f"{phase.flops / phase.seconds / 1e9:.0f}",
                f"{limit:.2f}",
                f"{limit / phase.seconds:.0%}",
            ]
        )
    gaps = [phase.seconds - limit for phase, limit in zip(phases, limits, strict=True)]
    lost = max(gaps)
    largest = phases[gaps.index(lost)].name
    cause = CAUSES.get(largest, OTHER_CAUSE)
    header = ("phase", "seconds", "GFLOP/s", "limit, s", "of the limit")
    return (
        f"{name}:\n\n{markdown_table(header, cells)}\n"
        f"The largest gap is in {largest}: {lost:.2f} s over its limit. Likely cause: "
        f"{cause}.\n\n"
    ), rows


def _ppo_needs(
    work: Workload, policy: ModelSize, scalar: ModelSize
) -> tuple[dict[str, float], dict[str, float]]:
    trees = [
        PromptTree(tuple(prompt), ((0,) * length,))
        for prompt, length in zip(work.prompts, work.response_lengths, strict=True)
    ]
    flops = update_flops(policy, scalar, [scalar], work_of(trees), Work(), num_epochs=1)
    policy_bytes = FLOAT_BYTES * (policy.weights + policy.unembedding)
    scalar_bytes = FLOAT_BYTES * scalar.weights
    # The value model's size leaves out its embedding, which is as large as the policy's.
    both = policy_bytes + scalar_bytes + FLOAT_BYTES * policy.unembedding
    return flops, {
        "rollout": policy_bytes * max(work.response_lengths),
        "score": scalar_bytes,
        "logprobs": policy_bytes,
        "reference": policy_bytes,
        "value": scalar_bytes,
        "train": 3 * both,
        "step": ADAM_ARRAYS * both,
    }


def _rm_needs(
    work: Workload, scalar: ModelSize, num_embeddings: int
) -> tuple[dict[str, float], dict[str, float]]:
    trees = [
        PromptTree(tuple(prompt), tuple(map(tuple, responses)))
        for prompt, responses in zip(work.prompts, work.responses, strict=True)
    ]
    weights = FLOAT_BYTES * (scalar.weights + num_embeddings)
    return (
        {"gradient": training_flops(scalar, work_of(trees))},
        {"gradient": 3 * weights, "step": ADAM_ARRAYS * weights},
    )


def _median_phases(work: Workload, num_threads: int, num_samples: int) -> dict[str, float]:
    log = WORK_DIR / "logs" / f"roofline-{work.name}.log"
    with Worker(commands(work)["ours"], work, num_threads=num_threads, log=log) as worker:
        worker.run()
        return median_phases([worker.run() for _ in range(num_samples)])


def _on_meta(path: str, auto_class: Any) -> Any:
    with torch.device("meta"):
        return auto_class.from_config(AutoConfig.from_pretrained(path, num_labels=1))


def _machine_text(rates: Mapping[str, float], bandwidth: float) -> str:
    cells = [[name, f"{rate / 1e9:.0f}"] for name, rate in rates.items()]
    return (
        f"{markdown_table(('float32 product', 'GFLOP/s'), cells)}\n"
        f"Memory bandwidth (triad): {bandwidth / 1e9:.1f} GB/s\n\n"
    )


def _options(args: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.roofline",
        description="How close each phase comes to what the machine can do.",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--samples", type=int, default=3, help="samples of each program")
    parser.add_argument("--quick", action="store_true", help="smaller samples")
    parser.add_argument("--output", type=Path, default=WORK_DIR)
    return parser.parse_args(args)


if __name__ == "__main__":
    main()
