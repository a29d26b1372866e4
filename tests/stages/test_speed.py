"""Compares tokens a second and FLOPs utilisation of a PPO run with what its folder says."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

import stages.ppo.speed
from rlhf.measuring.flops import Work, forward_flops, size_of
from rlhf.models.loading import load_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat
from stages.ppo.config import Config, PtxSettings
from stages.ppo.train import train

RATE = 1e9


@pytest.fixture
def known_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages.ppo.speed, "matrix_rate", lambda device, dtype: RATE)


def test_a_run_logs_its_speed_and_reports_the_mean(
    ppo_config: Config, ppo_inputs: Path, known_rate: None
) -> None:
    (ppo_inputs / "speed.jsonl").write_text(json.dumps({"text": "the cat sat. " * 40}) + "\n")
    text = str(ppo_inputs / "speed.jsonl")
    ptx = PtxSettings(coef=0.1, text=text, block_tokens=16, blocks_per_episode=0.25)
    value_first = replace(ppo_config.ppo, value_warmup_updates=1)
    train(replace(ppo_config, ptx=ptx, ppo=value_first, num_updates=2))
    folder = Path(ppo_config.output_dir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    chat = load_chat(ModelSettings(path=str(folder)))
    size = size_of(load_policy(ModelSettings(path=str(folder))))
    (prompt_tokens,) = {len(chat.prompt_ids(f"say {number}")) for number in range(10)}
    total = {"tokens": 0.0, "flops": 0.0, "seconds": 0.0}
    for row, num_blocks in zip(rows, (0, 2 * 4), strict=True):  # 2 steps of 0.25 * 16 blocks
        seconds = row["seconds/update"] - row.get("seconds/save", 0.0)
        tokens = row["ppo/tokens_per_second"] * seconds
        flops = row["ppo/model_flops_utilisation"] * seconds * RATE
        responses = 32 * row["ppo/response_tokens"]
        assert tokens == pytest.approx(32 * prompt_tokens + responses, abs=32)  # "say 10", "say 11"
        block = forward_flops(size, Work(16, 15, 8 * 17))
        body = replace(size, attention=0, unembedding=0)
        # Passes: policy 1 sampling, 2 reading, 3 training; value model 1 reading, 3 training: 10.
        linear = 10 * forward_flops(body, Work(round(tokens)))
        unembedded = 6 * 2 * size.unembedding * responses
        bare = linear + unembedded + 3 * num_blocks * block
        # The rest is attention. It is convex in the length, so equal lengths need the least.
        lengths = (tokens / 32, prompt_tokens + 1 + ppo_config.rollout.max_new_tokens)
        low, high = (10 * 4 * size.attention * 32 * n * (n + 1) / 2 for n in lengths)
        assert bare + low <= flops < bare + high
        assert high - low < 3 * 8 * block  # otherwise the text would not show
        for name, value in (("tokens", tokens), ("flops", flops), ("seconds", seconds)):
            total[name] += value
    results = json.loads((folder / "results.json").read_text())
    assert results["tokens_per_second"] == pytest.approx(total["tokens"] / total["seconds"])
    utilisation = total["flops"] / total["seconds"] / RATE
    assert results["model_flops_utilisation"] == pytest.approx(utilisation)
