"""Compares the curves of all training stages on a very small tiny world with the golden ones.

python -m tests.pipeline.golden            runs the chain, prints the largest differences
python -m tests.pipeline.golden --renew    writes golden_curves.json anew

Renew the file only after a change that is meant to change results, and say why in the commit. The
settings are those of the preset quick, with fewer steps.
"""

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.tinyworld.build import build
from data.tinyworld.config import TinyWorldConfig
from rlhf.runs.settings import load_config
from stages.collect.collect import collect
from stages.collect.config import Config as CollectConfig
from stages.ppo.config import Config as PPOConfig
from stages.ppo.train import train as train_ppo
from stages.pretrain.config import Config as PretrainConfig
from stages.pretrain.train import pretrain
from stages.rm.config import Config as RMConfig
from stages.rm.train import train as train_rm
from stages.sft.config import Config as SFTConfig
from stages.sft.train import train as train_sft
from tests.stages.conftest import is_timing

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).with_name("golden_curves.json")

Curve = list[tuple[int, float]]
"""Pairs of step and value."""
Curves = dict[str, dict[str, Curve]]
"""Maps a stage to its metrics to their curves. Those of timings are empty."""

RELATIVE, ABSOLUTE = 1e-3, 1e-4
"""A value may differ from the golden one by ABSOLUTE + RELATIVE * |value|.

Torch's plain kernels with the SSE4 products of MKL differed from AVX2 kernels by 0.05 of that, and
two threads from one by less than 0.001. On another processor a sampled token may change, which then
changes every later value. Few steps keep this rare: about 2,500 tokens are sampled, and their
probabilities differed in the sixth digit.
"""
DIGITS = 7
"""Significant digits in the file."""


def run_chain(folder: Path) -> None:
    """Run the stages into a folder, each from the folders of those before it."""
    build(
        load_config(
            TinyWorldConfig,
            f"--output_dir {folder}/data --num_texts 300 --num_texts_held_out 16 "
            "--num_demonstrations 120 --num_prompts_rm 24 --num_prompts_ppo 48 "
            "--num_prompts_held_out 8".split(),
        )
    )
    lengths = "--max_prompt_tokens 64 --max_response_tokens 64"
    pretrain(
        _config(PretrainConfig, "pretrain", folder, "--vocab_size 512 --eval_steps 8 --log_steps 1")
    )
    train_sft(_config(SFTConfig, "sft", folder, f"--batch_size 16 --eval_every 4 {lengths}"))
    collect(
        _config(
            CollectConfig,
            "collect",
            folder,
            "--num_responses_max 5 --max_prompt_tokens 64 --max_new_tokens 12",
        )
    )
    train_rm(
        _config(RMConfig, "rm", folder, f"--batch_size 4 --num_epochs 2 --held_out 0.3 {lengths}")
    )
    parts = {
        "rm": {"model": str(folder / "rm")},
        "length": {"function": f"{__name__}:length", "weight": -0.1},
    }
    train_ppo(
        _config(
            PPOConfig,
            "ppo",
            folder,
            "--rollout.batch_size 16 --ppo.mini_batch_size 8 --ppo.num_epochs 2 --num_updates 3 "
            "--rollout.max_prompt_tokens 64 --rollout.max_new_tokens 12 --ppo.kl_coef 0.2 "
            "--ppo.clip_range 0.1 --optim.learning_rate 2e-3 --optim.warmup_steps 0 "
            "--num_eval_prompts 8 --eval_every 1 --checkpoint_every 1 --reward.model null",
            f"--reward.parts={json.dumps(parts)}",
        )
    )


def length(prompts: Sequence[Any], responses: Sequence[str], metas: Sequence[Any]) -> list[float]:
    """Return the number of words of each response."""
    return [float(len(response.split())) for response in responses]


def _config(config_class: Any, stage: str, folder: Path, options: str, *more: str) -> Any:
    """Load the settings of the preset quick with some changed."""
    preset = str(ROOT / "configs" / stage / "quick.yaml")
    words = ["--config", preset, "--run_dir", str(folder), *options.split(), *more]
    return load_config(config_class, words)


def read_curves(folder: Path) -> Curves:
    """Read what the stages of a chain logged."""
    return {path.parent.name: _curves(path) for path in sorted(folder.glob("*/metrics.jsonl"))}


def _curves(path: Path) -> dict[str, Curve]:
    curves: dict[str, Curve] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for name, value in row.items():
            if name != "step":
                curve = curves[name]
                if not is_timing(name):
                    curve.append((row["step"], float(f"{value:.{DIGITS}g}")))
    return dict(sorted(curves.items()))


class Difference(NamedTuple):
    """A value that is not the golden one."""

    excess: float
    """The difference divided by the largest that is allowed."""
    stage: str
    name: str
    step: int
    golden: float
    found: float


def compare(golden: Curves, found: Curves) -> Iterator[Difference]:
    """Yield the differences of all values, which must be of the same metrics at the same steps."""
    for stage, curves in golden.items():
        for name, curve in curves.items():
            for (step, value), (other_step, other) in zip(curve, found[stage][name], strict=True):
                assert step == other_step
                allowed = ABSOLUTE + RELATIVE * abs(value)
                yield Difference(abs(value - other) / allowed, stage, name, step, value, other)


def load_golden() -> Curves:
    curves: Curves = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return curves


def main() -> int:
    """Run the chain; return 1 if a curve is not the golden one."""
    parser = argparse.ArgumentParser(description="Compare or renew the golden curves.")
    parser.add_argument("--renew", action="store_true", help="write golden_curves.json anew")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run_chain(Path(folder))
        found = read_curves(Path(folder))
    if options.renew:
        GOLDEN.write_text(to_json(found), encoding="utf-8")
        print(f"wrote {GOLDEN}")
        return 0
    differences = sorted(compare(load_golden(), found), reverse=True)
    for one in differences[:20]:
        print(
            f"{one.excess:8.3f}  {one.stage} step {one.step} {one.name}: {one.golden} {one.found}"
        )
    return int(differences[0].excess > 1)


def to_json(curves: Curves) -> str:
    """Return curves as JSON with one line a metric, so that a change can be read."""
    stages = []
    for stage, of_stage in curves.items():
        rows = [f"    {json.dumps(name)}: {json.dumps(curve)}" for name, curve in of_stage.items()]
        stages.append(f"  {json.dumps(stage)}: {{\n" + ",\n".join(rows) + "\n  }")
    return "{\n" + ",\n".join(stages) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
