"""Compares passes without data with the same passes with data, and with sums by hand."""

from pathlib import Path

import pytest
import torch

from rlhf.inputs.packing import Packer, PromptTree
from rlhf.maths.logprobs import CHUNK_TOKENS
from rlhf.measuring.allocations import DryRun, LiveBytes
from rlhf.models.full import checkpoint_activations
from rlhf.models.heads import response_logprobs
from rlhf.models.loading import load_policy
from rlhf.models.settings import ModelSettings
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of

TREES = [PromptTree(tuple(range(1, 9)), (tuple(range(1, 13)), (4, 5, 6)))] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dry_run")
    tiny_policy_of("llama").save_pretrained(folder)
    byte_tokenizer("<s>", "</s>", "<pad>").save_pretrained(folder)
    return folder


def test_bytes_are_counted_while_a_tensor_lives_and_views_are_free() -> None:
    existing = torch.ones(100)
    with LiveBytes([existing]) as live:
        view = existing[:50]
        double = view * 2  # 200 bytes
        square = double * double  # 200 more
        assert live.now == 400
        del double
        assert live.now == 200
        total = square.sum()  # 4 bytes
    assert (live.now, live.peak) == (204, 400)
    assert total == 200


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_dry_pass_needs_what_a_real_one_needs(folder: Path, checkpointing: bool) -> None:
    settings = ModelSettings(path=str(folder))
    (row,) = Packer(100).rows(TREES)
    dry = DryRun()
    empty, policy = dry.policy(settings), load_policy(settings).train()
    if checkpointing:
        checkpoint_activations(empty)
        checkpoint_activations(policy)
    response_logprobs(policy, row).sum().backward()  # from now on there are gradients
    weights = list(policy.parameters())
    grads = [weight.grad for weight in weights if weight.grad is not None]
    (row,) = Packer(100).rows(TREES)  # a new row, without the mask that the first one made
    rotary = list(policy.buffers())
    with LiveBytes([*weights, *grads, *rotary]) as live:
        response_logprobs(policy, row).sum().backward()
    planned = dry.training(row, empty, None, [empty])
    assert live.peak > 100_000
    assert planned == pytest.approx(live.peak, rel=0.02)


def test_the_cache_of_sampling_holds_keys_and_values_of_all_tokens(folder: Path) -> None:
    """There are 2 layers, 2 heads of size 8 for keys and for values, and 5 prompts, in fp32."""
    dry = DryRun()
    policy = dry.policy(ModelSettings(path=str(folder)))
    peak, cache = dry.sampling(policy, 5, prompt_tokens=7, new_tokens=20)
    assert cache == 2 * 2 * (2 * 8) * 5 * (7 + 20 - 1) * 4
    assert peak > cache


def test_logits_of_more_than_a_chunk_take_no_more_memory(folder: Path) -> None:
    """Twice the tokens take fewer additional bytes than one tensor of their logits has."""
    dry = DryRun()
    policy = tiny_policy_of("llama", vocab_size=5000)
    policy.save_pretrained(folder / "wide")
    empty = dry.policy(ModelSettings(path=str(folder / "wide")))
    few, many = (
        dry.logprobs(empty, Packer(1).rows([PromptTree((1,), ((2,) * (n * CHUNK_TOKENS),))])[0])
        for n in (1, 2)
    )
    logits = 4 * CHUNK_TOKENS * 5000
    assert few > logits
    assert many - few < logits / 2


def test_nothing_of_a_model_without_data_is_in_memory(folder: Path) -> None:
    dry = DryRun()
    assert dry.policy(ModelSettings(path=str(folder))).lm_head.weight.device.type == "cpu"
    assert type(dry.policy(ModelSettings(path=str(folder))).lm_head.weight.data).__name__ == (
        "FakeTensor"
    )
