"""Runs the reward model and PPO-ptx with block masks, beside the same runs with segments."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.models import packed_attention
from rlhf.models.settings import NO_LORA, Attention, LoraSettings, ModelSettings
from rlhf.rewards.settings import RewardSettings
from stages.ppo.config import PtxSettings, RolloutSettings
from stages.ppo.train import train as train_ppo
from stages.rm.train import train as train_rm
from tests.distributed.chain import LORA, make_inputs, ppo_settings, rm_settings
from tests.stages.conftest import is_timing

TOLERANCE = 1e-4
"""Most that a figure may differ, or for figures above 1 the share that it may.

Both attentions add the same float32 products in another order. A sum of some hundred terms then
differs by some 100 * 6e-8 of itself, and chain.py's Adam moves no weight by more than 1e-3 / 1e-4
times the difference of a gradient. If a response sees the one before it, losses move by 3e-2.
"""
COUNTED = ("ppo/clip_fraction", "ppo/value_clip_fraction")
"""Shares of tokens beyond a threshold. One token of a rollout may lie on either side of it."""
NUM_TOKENS = 8 * 24
"""Tokens in a rollout. No response ends before its 24 tokens."""
ROW = 400
"""Tokens in a pass, which are four blocks of 128."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flex")
    make_inputs(folder)
    return folder


@pytest.fixture
def numbers_of_blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many blocks of queries each block mask has that an attention computes."""
    seen: list[int] = []
    compute = packed_attention._by_rows_of_blocks

    def note_and_compute(*arguments: Any) -> Any:
        seen.append(arguments[4].kv_num_blocks.shape[-1])
        return compute(*arguments)

    monkeypatch.setattr(packed_attention, "_by_rows_of_blocks", note_and_compute)
    return seen


@pytest.mark.parametrize("lora", [NO_LORA, LORA], ids=["all weights", "adapters"])
def test_reward_model_and_ppo_log_the_same(
    lora: LoraSettings, inputs: Path, tmp_path: Path, numbers_of_blocks: list[int]
) -> None:
    run_both(inputs, tmp_path / "sdpa", "sdpa", lora)
    assert numbers_of_blocks == []
    run_both(inputs, tmp_path / "flex", "flex_attention", lora)
    assert max(numbers_of_blocks) == 4
    for stage, num_rows in (("rm", 6), ("ppo", 3)):
        expected, found = (rows_of(tmp_path / name / stage) for name in ("sdpa", "flex"))
        assert len(expected) == num_rows
        for row, other in zip(expected, found, strict=True):
            assert row.keys() == other.keys()
            for name, value in row.items():
                allowed = 1.5 / NUM_TOKENS if name in COUNTED else TOLERANCE
                assert other[name] == pytest.approx(value, rel=allowed, abs=allowed), name
    assert abs(expected[-1]["ppo/kl"]) > 0.01  # the policy has moved


def run_both(inputs: Path, out: Path, attention: Attention, lora: LoraSettings) -> None:
    base = ModelSettings(path=str(inputs / "base"), attention=attention)
    common: dict[str, Any] = {"lora": lora, "micro_batch_tokens": ROW}
    train_rm(replace(rm_settings(inputs, inputs / "base", out / "rm", **common), model=base))
    reward = RewardSettings(
        model=str(out / "rm"), attention=attention, allow_chance_reward=True, normalize_on=4
    )
    ptx = PtxSettings(
        coef=0.5, text=str(inputs / "text.jsonl"), blocks_per_episode=1.0, block_tokens=64
    )
    settings = ppo_settings(
        inputs,
        inputs / "base",
        out / "rm",
        out / "ppo",
        policy=base,
        reward=reward,
        ptx=ptx,
        rollout=RolloutSettings(batch_size=8, max_new_tokens=24),
        num_updates=3,
        **common,
    )
    train_ppo(settings)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: value for name, value in row.items() if not is_timing(name)} for row in rows]
