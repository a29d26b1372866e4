"""What a launcher takes for a model in each process."""

from dataclasses import replace
from pathlib import Path

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
