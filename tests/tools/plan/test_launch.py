"""What a launcher takes for a model in each process."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.settings import ModelSettings
from tests.tools.plan.inputs import EMBEDDING, LAYER, OUTSIDE, weights_of
from tools.plan.launch import Launch

ROOT = Path(__file__).parents[3]


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


def test_a_launcher_file_is_read() -> None:
    zero = Launch.read(ROOT / "configs/accelerate/deepspeed_zero3.yaml")
    assert zero == Launch(8, zero_stage=3, mixed_precision="bf16", device="cuda")
    assert Launch.read(ROOT / "configs/accelerate/cpu2.yaml") == Launch(2, device="cpu")
    fsdp = Launch.read(ROOT / "configs/accelerate/fsdp2.yaml")
    assert fsdp == Launch(8, mixed_precision="bf16", device="cuda", is_fsdp=True)
    on_two = Launch.read(ROOT / "configs/accelerate/two_nodes_ddp.yaml")
    assert (on_two.num_processes, on_two.num_local_processes) == (16, 8)
    offloading = Launch.read(ROOT / "configs/accelerate/deepspeed_zero3_offload.yaml")
    assert offloading == replace(zero, offloads_optimizer=True, offloads_weights=True)


@pytest.mark.parametrize(
    ("stage", "device", "message"),
    [
        (3, "nvme", r"offloads param to nvme under ZeRO-3; the plan knows offloading to cpu"),
        (2, "cpu", r"offloads param to cpu under ZeRO-2"),
    ],
)
def test_other_offloading_is_refused(stage: int, device: str, message: str, tmp_path: Path) -> None:
    settings = {"deepspeed_config": {"zero_stage": stage, "offload_param_device": device}}
    (tmp_path / "file.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(ValueError, match=message):
        Launch.read(tmp_path / "file.yaml")


def test_a_step_copies_the_gradients_of_one_model_at_most(tiny: Path) -> None:
    policy = load_policy(ModelSettings(path=str(tiny / "sft")))
    shard = weights_of(tiny) // 2
    launch = Launch(2, zero_stage=3, device="cuda")
    assert launch.step(policy) == launch.step(policy, policy) == shard
    assert replace(launch, mixed_precision="bf16").step(policy) == shard
    assert Launch(2, is_fsdp=True, mixed_precision="bf16", device="cuda").step(policy) == shard


@pytest.mark.skipif(torch.cuda.is_available(), reason="then the default file means a GPU too")
@pytest.mark.parametrize(
    ("name", "device", "mixed_precision"),
    [("gpu", "cuda", "bf16"), ("default", "cpu", "no"), ("cpu", "cpu", "no")],
)
def test_a_file_for_one_gpu_is_planned_for_it_elsewhere(
    name: str, device: str, mixed_precision: str
) -> None:
    launch = Launch.read(ROOT / f"configs/accelerate/{name}.yaml")
    assert launch == Launch(device=device, mixed_precision=mixed_precision)


def test_fine_tuning_under_fsdp2_gathers_embedding_and_head_on_their_own(tiny: Path) -> None:
    """No module of ours wraps the policy, so accelerate finds both."""
    policy = load_policy(ModelSettings(path=str(tiny / "sft")))
    launch = Launch(2, mixed_precision="bf16", is_fsdp=True)
    # In bfloat16: norm and head with their gradients, two layers, and the gradients of one. In
    # float32: the gradients of another layer, on their way.
    head = EMBEDDING + 32
    layers = LAYER * (2 * 2 + 2 + 4)
    assert launch.training_pass(10**7, [policy], [policy]) == 10**7 + 2 * 2 * head + layers
    # At the end of a small pass: the embedding, and its gradients in both types.
    assert launch.training_pass(0, [policy], [policy]) == (2 + 2 + 4) * EMBEDDING + 4 * LAYER


def test_gradients_that_are_not_exchanged_stay_whole_under_fsdp2(tiny: Path) -> None:
    policy = load_policy(ModelSettings(path=str(tiny / "sft")))
    full = weights_of(tiny)
    fsdp2 = Launch(4, mixed_precision="bf16", is_fsdp=True)
    assert (fsdp2.gradients(policy), fsdp2.gradients_not_exchanged(policy)) == (full // 4, full)
    zero2 = Launch(4, mixed_precision="bf16", zero_stage=2)
    assert zero2.gradients_not_exchanged(policy) == full // 8
