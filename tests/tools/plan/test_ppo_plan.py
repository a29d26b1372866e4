"""The plan of PPO's settings, from numbers worked by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.models.loading import load_policy
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.settings import RewardSettings
from stages.ppo.config import Config
from tests.tools.plan.inputs import (
    EMBEDDING,
    LAYER,
    OUTSIDE,
    PROMPT_TOKENS,
    TAUGHT,
    VOCAB,
    save_reward,
    weights_of,
)
from tools.plan.launch import Launch
from tools.plan.make import make_plan


@pytest.mark.usefixtures("without_passes")
def test_what_is_held_is_split_as_the_launcher_says(tiny: Path, config: Config) -> None:
    full = weights_of(tiny)
    assert full == 4 * (OUTSIDE + 2 * LAYER)
    head = 4 * (32 - EMBEDDING)  # the value model has a head of one row instead of the unembedding
    value = full + head

    def held(**launch: Any) -> list[int]:
        found = make_plan(config, Launch(**launch)).held
        return [size for name, size in found.items() if "gradients" not in name]

    frozen = [full, full]  # moving average, reference
    assert held() == [full, 2 * full, value, 2 * value, *frozen]
    # ZeRO keeps another copy of the weights in float32.
    of_zero2 = [full, 3 * full // 2, value, 3 * value // 2, *frozen]
    assert held(num_processes=2, zero_stage=2) == of_zero2
    # ZeRO-3 leaves weights of up to 100,000 numbers whole: all but the embeddings.
    small, small_value = full - 4 * 2 * EMBEDDING, value - 4 * EMBEDDING
    of_models = [full // 2 + small, 3 * full // 2, value // 2 + small_value, 3 * value // 2]
    assert held(num_processes=2, zero_stage=3) == [*of_models, full // 2, full]
    halved = held(num_processes=4, zero_stage=2, mixed_precision="bf16")
    assert halved == [full // 2, 3 * full // 4, value // 2, 3 * value // 4, full, full // 2]
    # FSDP2 keeps float32 weights only, and the reference is in bfloat16.
    of_fsdp = held(num_processes=4, is_fsdp=True, mixed_precision="bf16")
    assert of_fsdp == [full // 4, full // 2, value // 4, value // 2, full // 4, full // 2]
    parallel = make_plan(config, Launch(num_processes=2)).held
    assert parallel["exchange of gradients"] == full + value


@pytest.mark.slow
@pytest.mark.parametrize("splitting", [{"zero_stage": 3}, {"is_fsdp": True}], ids=str)
def test_a_rollout_gathers_one_model_at_a_time(
    splitting: dict[str, Any], tiny: Path, config: Config
) -> None:
    """In bfloat16 under mixed precision, on every process. The reference needs no other model."""
    whole = make_plan(config, Launch(2, zero_stage=2, mixed_precision="bf16"))
    split = make_plan(config, Launch(2, mixed_precision="bf16", **splitting))
    policy, value = 2 * 2 * EMBEDDING, 2 * EMBEDDING  # what ZeRO-3 does not leave whole
    if "is_fsdp" in splitting:  # gathers with each model what both have outside their layers
        outside = OUTSIDE + EMBEDDING + 32 + 32
        policy = value = 2 * (outside + 2 * LAYER)
    gathered = {"rollout": policy, "logprobs": policy, "reference": 0, "value": value}
    assert split.parts["weights gathered to sample"] == policy
    assert whole.parts["weights gathered to sample"] == 0
    for phase, weights in gathered.items():
        passes = whole.phases[phase] - sum(whole.held.values())
        assert split.phases[phase] - sum(split.held.values()) == weights + passes


@pytest.mark.slow
@pytest.mark.parametrize(
    "launch", [{"zero_stage": 3}, {"zero_stage": 2}, {"is_fsdp": True}, {}], ids=str
)
def test_a_rollout_samples_in_bfloat16(launch: dict[str, Any], config: Config) -> None:
    """So the cache has 2 bytes a number, whatever brings the mixed precision."""
    numbers = 2 * 2 * 4 * 4  # layers, keys and values, their heads, and the size of a head
    tokens = PROMPT_TOKENS + config.rollout.max_new_tokens - 1
    plan = make_plan(config, Launch(2, mixed_precision="bf16", **launch))
    own = 4  # of the 8 episodes
    assert plan.parts["KV cache of a rollout"] == own * tokens * numbers * 2


@pytest.mark.slow
def test_offloaded_models_are_there_in_their_phases_only(tiny: Path, config: Config) -> None:
    kept, moved = (
        make_plan(replace(config, offload=offload), Launch(device="cuda"))
        for offload in (False, True)
    )
    reference = weights_of(tiny)
    assert moved.waiting == {"reference": reference}
    saved = {name: kept.phases[name] - moved.phases[name] for name in kept.phases}
    assert saved.pop("reference") == 0
    assert set(saved.values()) == {reference}
    on_cpu = make_plan(replace(config, offload=True), Launch())
    assert on_cpu.waiting == {}


def test_zero3_offloads_shards_to_the_host(config: Config) -> None:
    kept = Launch(2, zero_stage=3, mixed_precision="bf16", device="cuda")
    moved = replace(kept, offloads_optimizer=True, offloads_weights=True)
    before, after = make_plan(config, kept), make_plan(config, moved)
    policy = OUTSIDE + 2 * LAYER
    value = policy - EMBEDDING + 32
    # Each process has half of everything: weights and gradients in 2 bytes, and in 4 bytes Adam's
    # moments, DeepSpeed's copy of the weights and, on the host only, one of the gradients.
    assert after.waiting == {
        "policy: weights": policy,
        "policy: optimizer": 4 * 2 * policy,
        "value model: weights": value,
        "value model: optimizer": 4 * 2 * value,
        "gradients": policy + value,
    }
    assert after.host["what is offloaded"] == 2 * 10 * (policy + value)
    # Embeddings are split. What ZeRO-3 leaves whole stays, as do buffers, average and reference.
    assert after.held == {
        "policy: weights": 2 * (policy - 2 * EMBEDDING),
        "value model: weights": 2 * (value - EMBEDDING),
        "exchange of gradients": 2 * 5 * 10**8,
        "policy: moving average": 2 * policy,
        "reference": 2 * policy,
    }
    saved = {name: before.phases[name] - after.phases[name] for name in before.phases}
    assert set(saved.values()) == {(1 + 3 * 2 + 1) * (policy + value)}
    only_optimizer = make_plan(config, replace(kept, offloads_optimizer=True))
    assert only_optimizer.held["policy: weights"] == before.held["policy: weights"]
    assert "policy: weights" not in only_optimizer.waiting
    assert make_plan(config, replace(moved, device="cpu")).waiting == {}


def test_a_reference_that_teaches_reads_the_text_too(tiny: Path, config: Config) -> None:
    """Its pass is a third of training's FLOPs, and offloaded it visits the device for it."""
    taught = replace(config, ptx=TAUGHT)
    alone = replace(config, ptx=replace(TAUGHT, targets="text"))
    both, text = (make_plan(one, Launch(device="cuda")) for one in (taught, alone))
    assert both.flops["ptx"] == pytest.approx(text.flops["ptx"] / 3 * 4)
    assert both.phases["ptx"] > text.phases["ptx"]
    moved = make_plan(replace(taught, offload=True), Launch(device="cuda"))
    saved = {name: both.phases[name] - moved.phases[name] for name in ("ptx", "train")}
    assert saved == {"ptx": 0, "train": weights_of(tiny)}


@pytest.mark.usefixtures("without_passes")
def test_a_mean_update_has_its_share_of_the_checks(config: Config) -> None:
    config = replace(config, rollout=replace(config.rollout, check_every=4))
    flops = make_plan(config, Launch()).flops
    assert flops["logprobs"] == flops["reference"] / 4 > 0


@pytest.mark.usefixtures("without_passes")
def test_roles_over_one_base_hold_it_once(tiny: Path, config: Config, tmp_path: Path) -> None:
    base, lora = tiny / "sft", LoraSettings(rank=4)
    reward = save_reward(base, tmp_path / "reward", lora)
    config = replace(config, lora=lora, reward=RewardSettings(model=reward))
    # Rank r takes r (in + out) numbers for each of q, k, v, o, gate, up, down in two layers.
    adapter = 4 * 4 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    with_head = adapter + 4 * 32
    roles = {
        f"base {base}, float32": weights_of(tiny),
        "policy: adapter and head": adapter,
        "value model: adapter and head": with_head,
        "reward.model: adapter and head": with_head,
        "policy: optimizer": 2 * adapter,
        "value model: optimizer": 2 * with_head,
        "policy: moving average": adapter,
    }
    assert make_plan(config, Launch()).held == roles
    halved = replace(config, reward=RewardSettings(model=reward, dtype="bfloat16"))
    body = weights_of(tiny) // 2 - 2 * VOCAB * 32  # a classifier has no unembedding
    assert make_plan(halved, Launch()).held[f"base {base}, bfloat16"] == body
    on_two = make_plan(config, Launch(num_processes=2)).held
    assert on_two["exchange of gradients"] == adapter + with_head

    policy = tmp_path / "policy"
    save_policy(load_policy(config.policy, lora), load_tokenizer(str(base)), policy)
    trained_on = replace(config, policy=ModelSettings(path=str(policy)))
    assert make_plan(trained_on, Launch()).held == {
        **roles,
        "reference: adapter and head": adapter,
    }
    with pytest.raises(ValueError, match=r"lora\.rank is 2, but .* holds an adapter with 4"):
        make_plan(replace(trained_on, lora=LoraSettings(rank=2)), Launch())


@pytest.mark.usefixtures("without_passes")
def test_a_full_reward_model_is_a_base_of_its_own(
    tiny: Path, config: Config, tmp_path: Path
) -> None:
    """The value model starts from the reward model, so this is its base too."""
    reward = save_reward(tiny / "sft", tmp_path / "reward", LoraSettings())
    found = make_plan(
        replace(config, lora=LoraSettings(rank=4), reward=RewardSettings(model=reward)), Launch()
    ).held
    body = weights_of(tiny) - 4 * VOCAB * 32  # no unembedding
    assert {name: size for name, size in found.items() if name.startswith("base")} == {
        f"base {tiny / 'sft'}, float32": weights_of(tiny),
        f"base {reward}, float32": body,
    }
    assert found["reward.model: adapter and head"] == 4 * 32


@pytest.mark.usefixtures("without_passes")
def test_adapters_under_zero3_share_no_base(tiny: Path, config: Config) -> None:
    """ZeRO-3 splits the trained models' weights, and frozen ones are loaded whole, as in a run."""
    zero3 = Launch(num_processes=2, zero_stage=3)
    found = make_plan(replace(config, lora=LoraSettings(rank=4)), zero3).held
    adapter = 4 * 4 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    small = weights_of(tiny) - 4 * 2 * EMBEDDING + adapter
    assert found["policy: weights"] == (weights_of(tiny) + adapter) // 2 + small
    assert found["policy: optimizer"] == 3 * adapter // 2
    assert found["reference"] == weights_of(tiny)
