"""The GPU computes the same as the CPU, up to rounding, and keeps no memory afterwards."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.generation.hf import LoopEngine
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.packing import Layout, Packer, PromptTree
from rlhf.models.heads import response_logprobs
from rlhf.models.layout import packer_for
from rlhf.models.passes import compute_logprobs, compute_scores, compute_values
from rlhf.models.settings import Attention
from rlhf.training.offloading import on_device
from tests.rlhf.tiny_models import VOCAB, tiny_policy_of, tiny_scalar_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

ARCHITECTURES = ("llama", "qwen3", "gpt2", "gemma3_text")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOLERANCE = 1e-4
"""Tolerance in nats, or units of a score, in float32. torch uses no TF32 in matrix products."""
HALF_TOLERANCE = 0.1
"""Tolerance in nats in bfloat16, which keeps eight bits."""


def trees() -> list[PromptTree]:
    """Return a ranking of three responses, and three prompts with one response each."""
    ids = [1 + (7 * i) % (VOCAB - 1) for i in range(60)]

    def part(start: int, end: int) -> tuple[int, ...]:
        return tuple(ids[start:end])

    return [
        PromptTree(part(0, 6), (part(6, 12), part(12, 20), part(20, 21))),
        *(PromptTree(part(i, i + 3), (part(i + 3, i + 9),)) for i in (21, 30, 39)),
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_passes_equal_those_of_the_cpu(architecture: str) -> None:
    policy, scalar = tiny_policy_of(architecture), tiny_scalar_of(architecture)
    found = []
    for device in (CPU, CUDA):
        packer = packer_for(policy.to(device), 64)
        assert packer.shares_prompts
        of_scalar = packer_for(scalar.to(device).classifier, 64)
        found.append(
            (
                compute_logprobs(policy, trees(), packer),
                compute_values(scalar, trees(), of_scalar),
                compute_scores(scalar, trees(), of_scalar),
            )
        )
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, atol=TOLERANCE, rtol=0)


def test_gradients_of_a_packed_row_equal_those_of_the_cpu() -> None:
    policy = tiny_policy_of("llama")
    gradients = []
    for device in (CPU, CUDA):
        policy.to(device).zero_grad()
        (row,) = Packer(100).rows(trees())
        response_logprobs(policy, row.to(device)).mean().backward()
        gradients.append({name: one.grad.cpu() for name, one in policy.named_parameters()})
    torch.testing.assert_close(gradients[1], gradients[0], atol=TOLERANCE, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packing_probe_accepts_masks_on_the_gpu(architecture: str, dtype: torch.dtype) -> None:
    policy = tiny_policy_of(architecture).to(CUDA, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a probe that refuses a layout warns
        assert packer_for(policy, 64).shares_prompts


def long_trees(longest: int) -> list[PromptTree]:
    """Return trees of 353 + longest tokens; above 256, their row has blocks of all kinds."""
    ids = tuple(1 + (7 * i) % (VOCAB - 1) for i in range(longest))
    return [
        PromptTree(ids, (ids[40:80], ids[:90])),
        PromptTree(ids[:20], (ids[:30],)),
        PromptTree(ids[:100], (ids[:3], ids[:70])),
    ]


def wide_policy(attention: Attention, num_heads: int) -> Any:
    """Make a Llama with two heads of keys, as wide as FlexAttention's kernels need."""
    sizes = {"head_dim": 32, "num_attention_heads": num_heads, "num_key_value_heads": 2}
    return tiny_policy_of("llama", attention=attention, **sizes).to(CUDA)


def logprobs_and_gradients(
    policy: Any, layout: Layout, dtype: torch.dtype, longest: int = 280
) -> list[Tensor]:
    """Return a long row's log-probabilities, and all gradients of their mean as one vector."""
    (row,) = Packer(2000, layout).rows(long_trees(longest))
    policy.zero_grad()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        logprobs = response_logprobs(policy, row.to(CUDA))
    logprobs.mean().backward()
    return [logprobs.detach(), torch.cat([one.grad.flatten() for one in policy.parameters()])]


@pytest.mark.parametrize("num_heads", [2, 4, 6])
def test_flex_attention_equals_sdpa(num_heads: int) -> None:
    policy, dense = wide_policy("flex_attention", num_heads), wide_policy("sdpa", num_heads)
    assert packer_for(policy, 64).layout == Layout.BLOCKS
    # One kernel serves all lengths, also those of whole blocks (287, 671).
    for longest in (280, 287, 671, 1001, 281):
        found = logprobs_and_gradients(policy, Layout.BLOCKS, torch.float32, longest)
        expected = logprobs_and_gradients(dense, Layout.MASK, torch.float32, longest)
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=1e-3)


@pytest.mark.parametrize("num_heads", [2, 4, 6])
def test_flex_attention_in_bfloat16_rounds_no_more_than_sdpa(num_heads: int) -> None:
    def run(attention: Attention, layout: Layout, dtype: torch.dtype) -> list[Tensor]:
        return logprobs_and_gradients(wide_policy(attention, num_heads), layout, dtype)

    exact = run("sdpa", Layout.MASK, torch.float32)
    dense = run("sdpa", Layout.MASK, torch.bfloat16)
    blocks = run("flex_attention", Layout.BLOCKS, torch.bfloat16)
    for true, by_sdpa, by_flex in zip(exact, dense, blocks, strict=True):
        error, usual = ((one - true).norm() / true.norm() for one in (by_flex, by_sdpa))
        assert 0 < error < 2 * usual


@torch.no_grad()
def test_flex_attention_holds_nothing_for_every_pair_of_tokens() -> None:
    policy = wide_policy("flex_attention", 2)
    length = 16384
    part = tuple(1 + i % (VOCAB - 1) for i in range(length // 32))
    trees = [PromptTree(part, (part, part, part))] * 8  # 4 x 512 tokens each
    (row,) = Packer(length, Layout.BLOCKS).rows(trees)
    row = row.to(CUDA)
    response_logprobs(policy, row)  # this compiles the kernels
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    response_logprobs(policy, row)
    assert torch.cuda.max_memory_allocated() - before < length**2  # bool takes a byte a pair


def test_autocast_stays_near_float32() -> None:
    policy = tiny_policy_of("llama").to(CUDA)
    packer = packer_for(policy, 64)
    exact = compute_logprobs(policy, trees(), packer)
    with torch.autocast("cuda", torch.bfloat16):
        rounded = compute_logprobs(policy, trees(), packer)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < HALF_TOLERANCE


def test_greedy_responses_and_their_logprobs_equal_those_of_the_cpu() -> None:
    prompts, how = (
        [[5, 6, 7], [8, 9], [11, 12, 13, 14]],
        Decoding(end_id=1, max_new_tokens=12, temperature=0.0),
    )
    engine, samples = LoopEngine(GenerationSettings(batch_size=2)), []
    for device in (CPU, CUDA):
        engine.refresh(tiny_policy_of("llama").to(device))
        samples.append(engine.generate(prompts, how))
    assert samples[1].responses == samples[0].responses
    for on_gpu, on_cpu in zip(samples[1].logprobs, samples[0].logprobs, strict=True):
        assert on_gpu == pytest.approx(on_cpu, abs=TOLERANCE)


def test_draws_on_the_gpu_are_decided_by_the_generator_on_the_cpu() -> None:
    engine = LoopEngine(GenerationSettings())
    engine.refresh(tiny_policy_of("llama").to(CUDA))
    how = Decoding(end_id=1, max_new_tokens=20, temperature=1.0)
    one, again, other = (
        engine.generate([[5, 6, 7]], how, torch.Generator().manual_seed(seed)).responses
        for seed in (0, 0, 1)
    )
    assert one == again != other


def test_a_model_leaves_no_memory_behind_on_the_gpu() -> None:
    model = nn.Linear(1000, 1000)
    before = torch.cuda.memory_allocated()
    with on_device([model], CUDA, offload=True):
        assert torch.cuda.memory_allocated() - before >= 4_000_000
        assert model.weight.device.type == "cuda"
    assert torch.cuda.memory_allocated() == before
    assert model.weight.device.type == "cpu"
