"""Compares the plan's peaks with the memory of real runs, and makes every preset's table."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.saving import save_policy
from rlhf.models.settings import Attention, LoraSettings, ModelSettings
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.settings import RewardSettings
from rlhf.runs.settings import settings_in_use
from rlhf.training.settings import OptimSettings
from stages.ppo.config import Config, MonitorSettings, PPOSettings, PtxSettings, RolloutSettings
from stages.sft.config import Config as SFTConfig
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of
from tools.launch import Launch
from tools.plan import Rows, main, make_plan

ROOT = Path(__file__).parents[2]
VOCAB = 4096
PROMPT_TOKENS = 112
TOLERANCE = 0.15

SMALL: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6}
"""A model of 6.6 million weights."""
LARGE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 6}
"""A model of 22 million weights."""


TEXT = PtxSettings(coef=0.1, text="text.jsonl", block_tokens=64, blocks_per_episode=2.0)


def write_inputs(folder: Path, **size: Any) -> Path:
    """Write a policy, prompts of PROMPT_TOKENS tokens each, and text."""
    folder.mkdir()
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
    policy = tiny_policy_of("llama", vocab_size=VOCAB, **heads, **size)
    for parameter in policy.parameters():
        parameter.data.mul_(0.1)  # unsure of everything, so that responses do not end
    save_policy(policy, tokenizer, folder / "sft")
    filler = PROMPT_TOKENS - len(Chat(tokenizer).prompt_ids(""))
    rows = [{"prompt": letter * filler} for letter in "abcdefgh"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.jsonl").write_text(json.dumps({"text": "the cat sat. " * 400}) + "\n")
    return folder


def run_config(folder: Path, output: Path, **changes: Any) -> Config:
    settings = Config(
        output_dir=str(output),
        policy=ModelSettings(path=str(folder / "sft")),
        prompts=str(folder / "prompts.jsonl"),
        reward=RewardSettings(function="tests.stages.conftest:some_length"),
        rollout=RolloutSettings(batch_size=8, max_prompt_tokens=PROMPT_TOKENS, max_new_tokens=16),
        generation=GenerationSettings(batch_size=8),
        ppo=PPOSettings(mini_batch_size=4, value_clip_range=None),
        ptx=PtxSettings(coef=0.0),
        monitor=MonitorSettings(stop_on=[]),
        optim=OptimSettings(learning_rate=1e-5, schedule="constant"),
        micro_batch_tokens=256,
        num_updates=1,
        ema_decay=None,
    )
    return replace(settings, **changes)


def measured_peak(folder: Path, config: Config, launcher: str = "", gpu_file: str = "") -> int:
    """Of the run in a process of its own, where freed memory goes back to the system at once.

    Args:
        launcher: The launcher file that starts two such processes. The first one is measured.
        gpu_file: The launcher file for GPUs whose settings they take.
    """
    warm_up = run_config(
        write_inputs(folder / "tiny"),
        folder / "warm_up",
        rollout=replace(config.rollout, batch_size=2, max_new_tokens=2),
        ppo=replace(config.ppo, mini_batch_size=2),
        ptx=replace(config.ptx, text=str(folder / "tiny/text.jsonl"), block_tokens=8),
        ema_decay=config.ema_decay,
    )
    for name, one in (("warm_up", warm_up), ("run", config)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(settings_in_use(one)))
    program = ["-m", "tests.tools.measured_run", "warm_up.yaml", "run.yaml"]
    if launcher:
        file = str(ROOT / f"configs/accelerate/{launcher}.yaml")
        launch = ["-m", "accelerate.commands.launch", "--config_file", file]
        program = [*launch, *program, *([gpu_file] if gpu_file else [])]
    output = subprocess.check_output(
        [sys.executable, *program],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "MALLOC_MMAP_THRESHOLD_": "262144",
            "MALLOC_ARENA_MAX": "1",
        },
        text=True,
    )
    return int(output.split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "changes"),
    [
        pytest.param(SMALL, {}, marks=pytest.mark.long),
        pytest.param(LARGE, {}, marks=pytest.mark.long),
        (SMALL, {"ptx": TEXT, "ema_decay": 0.9, "micro_batch_tokens": 512}),
        pytest.param(LARGE, {"lora": LoraSettings(rank=8)}, marks=pytest.mark.long),
    ],
    ids=["6.6M", "22M", "6.6M with text", "22M with adapters"],
)
def test_the_peak_of_a_run_is_what_was_planned(
    size: dict[str, int], changes: dict[str, Any], tmp_path: Path
) -> None:
    inputs = write_inputs(tmp_path / "inputs", **size)
    config = run_config(inputs, tmp_path / "run", **changes)
    config = replace(config, ptx=replace(config.ptx, text=str(inputs / "text.jsonl")))
    planned = make_plan(config, Launch()).peak
    assert measured_peak(tmp_path, config) == pytest.approx(planned, rel=TOLERANCE)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(
    ("launcher", "gpu_file", "launch"),
    [
        ("cpu2", "", Launch(2)),
        ("cpu2_zero2", "", Launch(2, zero_stage=2)),
        ("cpu2_zero3", "", Launch(2, zero_stage=3)),
        ("cpu2", "fsdp2", Launch(2, mixed_precision="bf16", is_fsdp=True)),
    ],
    ids=["DDP", "ZeRO-2", "ZeRO-3", "FSDP2"],
)
def test_the_peak_of_each_process_is_what_was_planned(
    launcher: str, gpu_file: str, launch: Launch, tmp_path: Path
) -> None:
    if launch.zero_stage:
        pytest.importorskip("deepspeed")
    inputs = write_inputs(tmp_path / "inputs", **LARGE)
    config = run_config(inputs, tmp_path / "run")
    config = replace(config, ptx=replace(config.ptx, text=str(inputs / "text.jsonl")))
    planned = make_plan(config, launch).peak
    measured = measured_peak(tmp_path, config, launcher, gpu_file)
    assert measured == pytest.approx(planned, rel=TOLERANCE)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("plan") / "inputs")


@pytest.fixture
def config(tiny: Path, tmp_path: Path) -> Config:
    return replace(run_config(tiny, tmp_path / "run"), ema_decay=0.9)


def weights_of(tiny: Path) -> int:
    """Return the bytes of the policy's weights on disk."""
    return sum(weight.nbytes for weight in load_file(tiny / "sft/model.safetensors").values())


EMBEDDING = VOCAB * 32
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48 + 2 * 32
"""Numbers of q, k and v, o, gate and up and down, and two norms."""
OUTSIDE = 2 * EMBEDDING + 32
"""Of the policy: embedding, unembedding and the last norm."""


@pytest.mark.slow
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


def test_a_pass_of_fsdp2_gathers_layer_by_layer(tiny: Path) -> None:
    policy = load_policy(ModelSettings(path=str(tiny / "sft")))
    value_model = load_scalar(ModelSettings(path=str(tiny / "sft")), new_head=True)
    launch = Launch(2, mixed_precision="bf16", is_fsdp=True)
    # In bfloat16: everything outside layers, the gradient of the unembedding, two layers, and the
    # gradients of one. In float32: the gradients of another layer, on their way.
    outside = 2 * (OUTSIDE + EMBEDDING + 32 + 32) + 2 * EMBEDDING
    layers = LAYER * (2 * 2 + 2 + 4)
    both = [policy, value_model]
    assert launch.training_pass(10**7, [policy], both) == 10**7 + outside + layers
    # At the end of a small pass, the gradients outside layers in both types.
    assert launch.training_pass(0, [policy], both) == (2 + 4) * OUTSIDE + 4 * LAYER
    in_float32 = Launch(2, is_fsdp=True)
    assert in_float32.training_pass(10**7, [policy], both) - 10**7 == 2 * outside + 16 * LAYER


def test_zero_exchanges_gradients_through_a_bucket(tiny: Path) -> None:
    policy = load_policy(ModelSettings(path=str(tiny / "sft")))
    full, embeddings = weights_of(tiny), 4 * 2 * EMBEDDING
    zero2, zero3 = (Launch(2, zero_stage=stage) for stage in (2, 3))
    assert zero2.training_pass(10**7, [policy], [policy]) == 10**7 + full
    assert (zero2.exchange(policy), zero3.exchange(policy)) == (0, full)
    # All weights of a small model stay gathered. Gradients are laid side by side at the end.
    assert zero3.training_pass(10**7, [policy], [policy]) == 10**7 + embeddings
    assert zero3.training_pass(0, [policy], [policy]) == embeddings + 2 * full
    # On a GPU the bucket has 5e8 numbers, which are taken at once.
    on_gpu = replace(zero3, device="cuda")
    assert on_gpu.exchange(policy) == 4 * 5 * 10**8


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


def test_a_mean_update_has_its_share_of_the_checks(config: Config) -> None:
    config = replace(config, rollout=replace(config.rollout, check_every=4))
    flops = make_plan(config, Launch()).flops
    assert flops["logprobs"] == flops["reference"] / 4 > 0


def save_reward(base: Path, folder: Path, lora: LoraSettings) -> str:
    """Save a reward model on the body of a policy."""
    settings = ModelSettings(path=str(base))
    load_scalar(settings, new_head=True, lora=lora).save(folder, load_tokenizer(str(base)))
    return str(folder)


@pytest.mark.slow
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


def test_adapters_under_zero3_share_no_base(tiny: Path, config: Config) -> None:
    """ZeRO-3 splits the trained models' weights, and frozen ones are loaded whole, as in a run."""
    zero3 = Launch(num_processes=2, zero_stage=3)
    found = make_plan(replace(config, lora=LoraSettings(rank=4)), zero3).held
    adapter = 4 * 4 * 2 * (64 + 48 + 48 + 64 + 80 + 80 + 80)
    small = weights_of(tiny) - 4 * 2 * EMBEDDING + adapter
    assert found["policy: weights"] == (weights_of(tiny) + adapter) // 2 + small
    assert found["policy: optimizer"] == 3 * adapter // 2
    assert found["reference"] == weights_of(tiny)


def test_quantized_weights_are_refused(tiny: Path, tmp_path: Path) -> None:
    config = SFTConfig(
        output_dir=str(tmp_path),
        model=ModelSettings(path=str(tiny / "sft")),
        demonstrations="unused",
        lora=LoraSettings(rank=2, quantize="4bit"),
    )
    with pytest.raises(ValueError, match=r"lora\.quantize is 4bit, and the plan knows no"):
        make_plan(config, Launch())


@pytest.mark.parametrize(
    ("device", "attention", "has_mask"),
    [
        ("cpu", "sdpa", False),
        ("cuda", "sdpa", True),
        ("cuda", "flex_attention", False),
        ("cpu", "eager", True),
    ],
)
def test_rows_have_a_mask_where_a_run_has_one(
    device: str, attention: Attention, has_mask: bool
) -> None:
    rows = Rows(ModelSettings(path="unused", attention=attention), 32, device)
    row = rows.of_episodes(prompt=8, response=8, num_trees=2)
    assert (row.attention_mask is not None) == has_mask
    assert rows.of_episodes(prompt=8, response=8, num_trees=1).attention_mask is None


@pytest.mark.parametrize("stage", ["ppo", "rm", "sft"])
@pytest.mark.slow
def test_the_program_tells_the_stage_by_its_settings(
    stage: str, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {"ppo": "policy", "rm": "model", "sft": "model"}[stage]
    small = {
        "ppo": ["--generation.batch_size=4", "--rollout.batch_size=32"],
        "rm": [],
        "sft": ["--micro_batch_size=2", "--num_samples=2"],
    }[stage]
    settings = ROOT / f"configs/{stage}/tiny.yaml"
    main(["--config", str(settings), f"--{model}.path", str(tiny / "sft"), *small])
    printed = capsys.readouterr().out
    assert {"ppo": "seconds of an update", "rm": "seconds of a pass of", "sft": "an optimizer"}[
        stage
    ] in printed
    assert printed.count("<- peak") == 1


def test_a_launcher_file_is_read() -> None:
    zero = Launch.read(ROOT / "configs/accelerate/deepspeed_zero3.yaml")
    assert zero == Launch(8, zero_stage=3, mixed_precision="bf16", device="cuda")
    assert Launch.read(ROOT / "configs/accelerate/cpu2.yaml") == Launch(2, device="cpu")
    fsdp = Launch.read(ROOT / "configs/accelerate/fsdp2.yaml")
    assert fsdp == Launch(8, mixed_precision="bf16", device="cuda", is_fsdp=True)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["--accelerate", "fsdp1.yaml"], "asks for fsdp_version 1; give 2"),
        (["--accelerate", "broken.yaml"], "error: broken.yaml is not YAML: while"),
        (["--config=broken.yaml"], "error: broken.yaml is not YAML: while"),
    ],
)
def test_files_that_cannot_be_planned_are_named(
    files: list[str],
    message: str,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "broken.yaml").write_text("model: [a\n")
    (tmp_path / "fsdp1.yaml").write_text("distributed_type: FSDP\n")
    with pytest.raises(SystemExit) as stopped:
        main(["--config=configs/ppo/tiny.yaml", "--policy.path", str(tiny / "sft"), *files])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_without_settings_the_plan_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--accelerate" in capsys.readouterr().out


def test_a_model_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ROOT / "configs/ppo/tiny.yaml"
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(settings), "--policy.path", str(tmp_path / "none")])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: the model folder ")
