"""Packed passes give the same as separate ones, and every token comes back in its place."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rlhf.inputs.block_masks
import rlhf.models.layout
from rlhf.inputs.packing import (
    Layout,
    PackedRow,
    Packer,
    PromptTree,
    assemble,
    predicting_rows,
    response_batch,
    text_tree,
)
from rlhf.models.full import checkpoint_activations
from rlhf.models.heads import has_plain_head, response_likelihoods, response_logprobs
from rlhf.models.layout import packer_for
from rlhf.models.packed_attention import PACKED_SDPA
from rlhf.models.passes import compute_logprobs, compute_scores, compute_values
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import Attention
from tests.rlhf.tiny_models import VOCAB, tiny_policy_of, tiny_scalar_of

PACKABLE = ["llama", "gpt2", "gpt_neox", "qwen3", "opt", "mistral", "gemma3_text"]
LAYOUTS = [Layout.SEGMENTS, Layout.MASK, Layout.SEQUENCES]
PACKED: list[tuple[str, Attention, Layout]]
PACKED = [(name, "sdpa", layout) for name in PACKABLE for layout in LAYOUTS]
PACKED += [(name, "flex_attention", Layout.BLOCKS) for name in [*PACKABLE, "qwen2"]]
PACKED += [(name, "eager", layout) for name in ("llama", "gpt2") for layout in LAYOUTS[1:]]
PACKED.remove(("opt", "sdpa", Layout.SEQUENCES))  # transformers makes its mask without positions
"""Architecture, attention, and layout of a row."""


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks so small that a row of some tens of tokens has several."""
    monkeypatch.setattr(rlhf.inputs.block_masks, "BLOCK_TOKENS", 8)


EXAMPLE = PromptTree(prompt=(10, 11, 12), responses=((20, 21), (30, 31, 32)))


def random_trees(seed: int = 0, *, shortest_response: int = 1) -> list[PromptTree]:
    generator = torch.Generator().manual_seed(seed)

    def ids(shortest: int, longest: int) -> tuple[int, ...]:
        length = int(torch.randint(shortest, longest + 1, (), generator=generator))
        return tuple(torch.randint(3, VOCAB, (length,), generator=generator).tolist())

    return [
        PromptTree(ids(1, 9), tuple(ids(shortest_response, 8) for _ in range(num_responses)))
        for num_responses in (3, 1, 4, 2)
    ]


def separate_logprobs(policy: torch.nn.Module, trees: list[PromptTree]) -> list[Tensor]:
    """Return the log-probabilities of each response from a pass of its own, without packing."""
    results = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.tensor([[*tree.prompt, *response]])
            logprobs = policy(input_ids=ids).logits[0].log_softmax(-1)
            start = len(tree.prompt)
            results.append(
                torch.stack([logprobs[start + t - 1, token] for t, token in enumerate(response)])
            )
    return results


def separate_outputs(model: ScalarModel, trees: list[PromptTree]) -> list[Tensor]:
    """Return the scalar at every token of each prompt and response, from passes of their own."""
    results = []
    for tree in trees:
        for response in tree.responses:
            ids = torch.tensor([[*tree.prompt, *response]])
            hidden = model.classifier.base_model(input_ids=ids).last_hidden_state[0]
            results.append(0.5 * (hidden @ model.head.weight[0] - 0.3))
    return results


def gradients(model: torch.nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def weighted_sum(terms: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    pairs = zip(terms, weights, strict=True)
    return sum(((term * weight).sum() for term, weight in pairs), start=torch.zeros(()))


def weights_like(parts: list[Tensor]) -> list[Tensor]:
    """Return uneven weights, so that a gradient shows which token it came from."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(part.shape, generator=generator) for part in parts]


def test_layout_of_the_documented_example() -> None:
    (row,) = Packer(8).rows([EXAMPLE])
    assert row.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert row.predictors.tolist() == [2, 3, 2, 5, 6]
    assert row.targets.tolist() == [20, 21, 30, 31, 32]
    assert row.last_tokens.tolist() == [4, 7]
    assert row.response_mask.sum(1).tolist() == [2, 3]
    assert row.response_mask.tolist() == [[True, True, False], [True, True, True]]


def test_mask_of_the_documented_example_and_a_second_tree() -> None:
    (row,) = Packer(10).rows([EXAMPLE, PromptTree((40,), ((50,),))])
    expected = [
        # p0 p1 p2 a0 a1 b0 b1 b2 q0 c0
        [1, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
    ]
    assert row.attention_mask is not None
    assert row.attention_mask.shape == (1, 1, 10, 10)
    assert row.attention_mask[0, 0].int().tolist() == expected

    (added,) = Packer(10, mask_dtype=torch.bfloat16).rows([EXAMPLE, PromptTree((40,), ((50,),))])
    assert added.attention_mask is not None
    assert added.attention_mask.dtype == torch.bfloat16
    assert (added.attention_mask == 0)[0, 0].int().tolist() == expected
    assert added.attention_mask.min() == torch.finfo(torch.bfloat16).min


def test_segments_name_prompts_and_responses() -> None:
    lone = PromptTree((40,), ((50,),))
    (row,) = Packer(12, layout=Layout.SEGMENTS).rows(
        [EXAMPLE, lone, PromptTree((60,), ((), (70,)))]
    )
    expected = [
        # queries, keys before them
        (0, 3, 0, 0),  # the prompt
        (3, 5, 0, 3),
        (5, 8, 0, 3),
        (8, 10, 8, 8),  # the only response, together with its prompt
        (10, 11, 10, 10),
        (11, 12, 10, 11),  # the empty response has no queries
    ]
    assert row.attention_mask is not None
    assert row.attention_mask.shape == (1, 1, 4, 6)
    assert row.attention_mask[0, 0].T.tolist() == [list(segment) for segment in expected]
    (alone,) = Packer(8, layout=Layout.SEGMENTS).rows([lone])
    assert alone.attention_mask is None


def test_one_response_alone_needs_no_mask() -> None:
    (row,) = Packer(5).rows([PromptTree((3, 4), ((5, 6, 7),))])
    assert row.attention_mask is None
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 4]]


def test_first_fit_takes_the_longest_tree_first() -> None:
    trees = [PromptTree((9,), ((5,) * (size - 1),)) for size in (3, 6, 4, 7, 12)]
    rows = Packer(10).rows(trees)
    assert [row.tree_index.tolist() for row in rows] == [[4], [3, 0], [1, 2]]


@pytest.mark.parametrize(("architecture", "attention", "layout"), PACKED)
def test_packed_logprobs_and_gradients_equal_separate(
    architecture: str, attention: Attention, layout: Layout
) -> None:
    policy = tiny_policy_of(architecture, attention=attention)
    trees = random_trees()
    packer = replace(packer_for(policy, micro_batch_tokens=64), layout=layout)
    rows = packer.rows(trees)
    assert len(rows) == 2, "several trees must share a row, or this test shows nothing"

    expected = separate_logprobs(policy, trees)
    weights = weights_like(expected)
    loss = weighted_sum(expected, weights)
    expected_gradients = gradients(policy, loss)

    parts = [row.unpack(response_logprobs(policy, row)) for row in rows]
    packed = assemble(rows, parts)
    for response, part in enumerate(expected):
        torch.testing.assert_close(packed[response, : len(part)], part, rtol=0, atol=1e-5)
        assert not packed[response, len(part) :].any()
    loss = weighted_sum([packed[i, : len(weight)] for i, weight in enumerate(weights)], weights)
    packed_gradients = gradients(policy, loss)
    assert packed_gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            packed_gradients[name], gradient, rtol=0, atol=1e-5 * scale, msg=name
        )
    torch.testing.assert_close(compute_logprobs(policy, trees, packer), packed.detach())


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("gemma2", {"final_logit_softcapping": 2.0}), ("granite", {"logits_scaling": 8.0})],
)
def test_logits_that_are_scaled_or_capped_after_the_head(
    architecture: str, changes: dict[str, Any]
) -> None:
    policy = tiny_policy_of(architecture, **changes)
    assert not has_plain_head(policy)
    trees = random_trees()
    found = compute_logprobs(policy, trees, Packer(1, layout=Layout.ALONE))
    for response, part in enumerate(separate_logprobs(policy, trees)):
        torch.testing.assert_close(found[response, : len(part)], part, rtol=0, atol=1e-5)


def test_logits_that_are_the_heads() -> None:
    assert all(has_plain_head(tiny_policy_of(name)) for name in ("llama", "gpt2", "gpt_neox"))


@pytest.mark.parametrize("layout", [Layout.MASK, Layout.BLOCKS])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_checkpointed_activations_change_no_gradient_and_are_not_kept(
    architecture: str, layout: Layout
) -> None:
    (row,) = Packer(1000, layout=layout).rows(random_trees())

    def gradients_and_bytes(policy: PreTrainedModel) -> tuple[dict[str, Tensor], int]:
        num_bytes = 0

        def keep(tensor: Tensor) -> Tensor:
            nonlocal num_bytes
            num_bytes += tensor.nbytes
            return tensor

        policy.train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = response_logprobs(policy, row).sum()
        return gradients(policy, loss), num_bytes

    expected, all_bytes = gradients_and_bytes(tiny_policy_of(architecture))
    policy = tiny_policy_of(architecture)
    checkpoint_activations(policy)
    found, kept_bytes = gradients_and_bytes(policy)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert kept_bytes < all_bytes / 2


@pytest.mark.parametrize(("architecture", "attention", "layout"), PACKED)
def test_packed_values_scores_and_gradients_equal_separate(
    architecture: str, attention: Attention, layout: Layout
) -> None:
    model = tiny_scalar_of(architecture, attention=attention)
    trees = random_trees(seed=1)
    packer = replace(packer_for(model.classifier, 64), layout=layout)
    rows = packer.rows(trees)
    assert len(rows) < len(trees)
    prompts = [len(tree.prompt) for tree in trees for _ in tree.responses]

    outputs = separate_outputs(model, trees)
    expected_values = [
        output[start - 1 : -1] for output, start in zip(outputs, prompts, strict=True)
    ]
    expected_scores = torch.stack([output[-1] for output in outputs])
    weights = weights_like([*expected_values, expected_scores])
    terms = [*expected_values, expected_scores]
    expected_gradients = gradients(model, weighted_sum(terms, weights))

    values = assemble(rows, [row.unpack(model(row.predictors, **row.model_inputs)) for row in rows])
    scores = assemble(rows, [model(row.last_tokens, **row.model_inputs) for row in rows])
    for response, part in enumerate(expected_values):
        torch.testing.assert_close(values[response, : len(part)], part, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-5)
    terms = [values[i, : len(part)] for i, part in enumerate(expected_values)] + [scores]
    packed_gradients = gradients(model, weighted_sum(terms, weights))
    for name, gradient in expected_gradients.items():
        scale = max(1.0, gradient.abs().max().item())
        torch.testing.assert_close(
            packed_gradients[name], gradient, rtol=0, atol=1e-5 * scale, msg=name
        )
    torch.testing.assert_close(compute_values(model, trees, packer), values.detach())
    torch.testing.assert_close(compute_scores(model, trees, packer), scores.detach())


@pytest.mark.parametrize(
    ("attention", "layout"),
    [("sdpa", Layout.SEGMENTS), ("eager", Layout.MASK), ("flex_attention", Layout.BLOCKS)],
)
@pytest.mark.parametrize("architecture", PACKABLE)
def test_probe_accepts(architecture: str, attention: Attention, layout: Layout) -> None:
    packer = packer_for(tiny_policy_of(architecture, attention=attention), 100)
    assert packer.shares_prompts
    assert packer.layout == layout


@pytest.mark.parametrize(
    ("is_autocast", "tolerance", "is_accepted"),
    [
        (True, "PACKING_TOLERANCE", True),
        (True, "HALF_TOLERANCE", False),
        (False, "PACKING_TOLERANCE", False),
        (False, "HALF_TOLERANCE", True),
    ],
)
def test_probe_under_autocast_has_the_tolerance_of_bf16(
    is_autocast: bool, tolerance: str, is_accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much bf16 rounds depends on the processor. A tolerance of 0 accepts no model on any."""
    monkeypatch.setattr(rlhf.models.layout, tolerance, 0.0)
    warned = pytest.warns(UserWarning, match="cannot take the packing mask")
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=is_autocast)
    with autocast, nullcontext() if is_accepted else warned:
        assert packer_for(tiny_policy_of("llama"), 100).shares_prompts == is_accepted


def test_model_that_takes_masks_but_no_segments_gets_masks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tiny_policy_of("llama")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, PACKED_SDPA, sdpa_attention_forward)
    packer = packer_for(policy, 100)
    assert packer.shares_prompts and packer.layout == Layout.MASK


@pytest.mark.parametrize("architecture", ["bloom", "mamba", "gpt_neo"])
def test_model_without_the_mask_falls_back_to_separate_passes(architecture: str) -> None:
    policy = tiny_policy_of(architecture)
    with pytest.warns(UserWarning, match="cannot take the packing mask"):
        packer = packer_for(policy, 64)
    trees = random_trees(seed=2)
    assert len(packer.rows(trees)) == sum(len(tree.responses) for tree in trees)
    with torch.no_grad():
        expected = separate_logprobs(policy, trees)
    logprobs = compute_logprobs(policy, trees, packer)
    for response, part in enumerate(expected):
        torch.testing.assert_close(logprobs[response, : len(part)], part, rtol=0, atol=1e-5)


def test_probe_refuses_a_model_that_ignores_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy_of("llama")
    forward = policy.model.forward
    monkeypatch.setattr(
        policy.model,
        "forward",
        lambda attention_mask=None, **inputs: forward(attention_mask=None, **inputs),
    )
    with pytest.warns(UserWarning, match="cannot take the packing mask"):
        assert not packer_for(policy, 64).shares_prompts


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("Expected all tensors to be on the same device, but found cuda:0 and cpu!"),
    ],
)
def test_probe_takes_no_fault_of_memory_or_device_for_a_refusal(
    error: RuntimeError, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy_of("llama")
    forward = policy.model.forward

    def fail_with_a_mask(**inputs: Any) -> Any:
        if inputs.get("attention_mask") is not None:
            raise error
        return forward(**inputs)

    monkeypatch.setattr(policy.model, "forward", fail_with_a_mask)
    with pytest.raises(type(error), match=re.escape(str(error)[:30])):
        packer_for(policy, 64)


def test_probe_refuses_a_model_that_has_no_use_for_the_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tiny_policy_of("llama")
    forward = policy.model.forward

    def refuse_a_mask(**inputs: Any) -> Any:
        if inputs.get("attention_mask") is not None:
            raise RuntimeError("The size of tensor a (26) must match the size of tensor b (4)")
        return forward(**inputs)

    monkeypatch.setattr(policy.model, "forward", refuse_a_mask)
    with pytest.warns(UserWarning, match="cannot take the packing mask"):
        assert not packer_for(policy, 64).shares_prompts


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_trees_deeper_than_the_window_go_alone(architecture: str) -> None:
    window = 14
    policy = tiny_policy_of(architecture, sliding_window=window)
    packer = packer_for(policy, 200)
    assert packer.shares_prompts
    assert packer.max_depth == window
    shallow = PromptTree(tuple(range(3, 10)), (tuple(range(10, 17)), tuple(range(20, 24))))
    deep = PromptTree(tuple(range(30, 42)), (tuple(range(42, 50)), tuple(range(50, 58))))
    assert shallow.depth == window < deep.depth
    rows = packer.rows([deep, shallow])
    assert [row.tree_index.tolist() for row in rows] == [[1, 1], [0], [0]]
    with torch.no_grad():
        expected = separate_logprobs(policy, [deep, shallow])
        shared = compute_logprobs(policy, [deep, shallow], Packer(200))
    logprobs = compute_logprobs(policy, [deep, shallow], packer)
    for response, part in enumerate(expected):
        torch.testing.assert_close(logprobs[response, : len(part)], part, rtol=0, atol=1e-5)
    assert (shared[0, :8] - expected[0]).abs().max() > 1e-3, "the window must matter here"


def test_window_shorter_than_the_probe_falls_back() -> None:
    policy = tiny_policy_of("mistral", sliding_window=5)
    with pytest.warns(UserWarning, match="cannot take the packing mask"):
        packer = packer_for(policy, 200)
    trees = random_trees(seed=3)
    with torch.no_grad():
        expected = separate_logprobs(policy, trees)
    logprobs = compute_logprobs(policy, trees, packer)
    for response, part in enumerate(expected):
        torch.testing.assert_close(logprobs[response, : len(part)], part, rtol=0, atol=1e-5)


def test_temperature_is_the_samplers() -> None:
    policy = tiny_policy_of("llama")
    tree = PromptTree((5, 6), ((7, 8),))
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([[5, 6, 7, 8]])).logits[0]
    expected = (logits / 0.7).log_softmax(-1)[[1, 2], [7, 8]]
    logprobs = compute_logprobs(policy, [tree], Packer(64), temperature=0.7)
    torch.testing.assert_close(logprobs[0], expected, rtol=0, atol=1e-5)


def test_a_response_without_tokens_has_no_score() -> None:
    (row,) = Packer(64).rows([PromptTree((5, 6), ((), (7,)))])
    with pytest.raises(ValueError, match="without tokens"):
        _ = row.last_tokens
    assert row.unpack(torch.tensor([4.0])).tolist() == [[0.0], [4.0]]


def test_document_is_predicted_from_its_first_token() -> None:
    (row,) = Packer(64).rows([text_tree([5, 6, 7, 8])])
    assert row.targets.tolist() == [6, 7, 8]
    assert row.predictors.tolist() == [0, 1, 2]


def test_response_batch_pads_with_zeros() -> None:
    ids, mask = response_batch([[7, 8, 9], [], [5]])
    assert ids.tolist() == [[7, 8, 9], [0, 0, 0], [5, 0, 0]]
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]


def ids_of(shortest: int, longest: int) -> st.SearchStrategy[tuple[int, ...]]:
    return st.lists(st.integers(0, 999), min_size=shortest, max_size=longest).map(tuple)


TREES = st.lists(
    st.builds(
        PromptTree,
        prompt=ids_of(1, 6),
        responses=st.lists(ids_of(0, 7), min_size=1, max_size=4).map(tuple),
    ),
    min_size=1,
    max_size=6,
)
PACKERS = st.builds(
    Packer,
    micro_batch_tokens=st.integers(1, 60),
    layout=st.sampled_from([Layout.ALONE, Layout.SEQUENCES, Layout.MASK]),
    max_depth=st.none() | st.integers(1, 13),
)


@settings(max_examples=100, deadline=None)
@given(trees=TREES, packer=PACKERS)
def test_segments_allow_what_the_mask_allows(trees: list[PromptTree], packer: Packer) -> None:
    with_segments = replace(packer, layout=Layout.SEGMENTS).rows(trees)
    with_masks = replace(packer, layout=Layout.MASK).rows(trees)
    for row, masked in zip(with_segments, with_masks, strict=True):
        if masked.attention_mask is None:
            assert row.attention_mask is None
            continue
        assert row.attention_mask is not None
        allowed = torch.zeros_like(masked.attention_mask[0, 0])
        for start, end, prompt_start, prompt_end in row.attention_mask[0, 0].T.tolist():
            allowed[start:end, start:end] = torch.ones(end - start, end - start).tril()
            allowed[start:end, prompt_start:prompt_end] = True
        assert torch.equal(allowed, masked.attention_mask[0, 0])


@settings(max_examples=50, deadline=None)
@given(trees=TREES, budget=st.integers(20, 80))
def test_block_masks_allow_what_the_mask_allows_and_list_what_torch_lists(
    trees: list[PromptTree], budget: int
) -> None:
    for row in Packer(budget, layout=Layout.BLOCKS).rows(trees):
        if row.plain:
            assert row.model_inputs.keys() == {"input_ids"}
            continue
        mask, dense = row.model_inputs["attention_mask"], row.attention_mask
        assert isinstance(mask, BlockMask) and dense is not None
        shape = 1, 1, len(row.tree), len(row.tree)
        assert mask.shape == shape
        assert torch.equal(create_mask(mask.mask_mod, *shape, device="cpu"), dense)
        by_torch = create_block_mask(mask.mask_mod, *shape, device="cpu", BLOCK_SIZE=8)
        for ours, theirs in zip(mask.as_tuple(), by_torch.as_tuple(), strict=True):
            if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
                assert torch.equal(ours, theirs)
            else:
                assert ours == theirs


def test_blocks_of_a_row_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.inputs.block_masks, "BLOCK_TOKENS", 2)
    trees = [PromptTree((10, 11, 12), ((20,), (30, 31))), PromptTree((40,), ((50,),))]
    (row,) = Packer(8, layout=Layout.BLOCKS).rows(trees)
    assert row.input_ids.tolist() == [[10, 11, 12, 20, 30, 31, 40, 50]]
    assert row.blocks is not None
    assert row.blocks.tolist() == [
        # 10 11, 12 20, 30 31, 40 50
        [1, 0, 0, 0],
        [2, 1, 0, 0],  # both tokens see 10 and 11
        [2, 1, 1, 0],  # 30 and 31 see 12, but not 20
        [0, 0, 0, 1],  # another tree
    ]


@settings(max_examples=200, deadline=None)
@given(trees=TREES, packer=PACKERS)
def test_every_token_comes_back_in_its_place(trees: list[PromptTree], packer: Packer) -> None:
    rows = packer.rows(trees)
    responses = [response for tree in trees for response in tree.responses]
    prompts = [tree.prompt for tree in trees for _ in tree.responses]
    tree_of = [number for number, tree in enumerate(trees) for _ in tree.responses]

    assert sorted(i for row in rows for i in row.response_index.tolist()) == list(
        range(len(responses))
    )
    batch, response_mask = response_batch(responses)
    ids = assemble(rows, [row.unpack(row.targets) for row in rows])
    assert ids.shape == batch.shape
    assert torch.equal(ids, batch)
    assert torch.equal(assemble(rows, [row.response_mask for row in rows]), response_mask)
    assert assemble(rows, [row.tree_index for row in rows]).tolist() == tree_of

    for row in rows:
        check_row(row, prompts, responses, packer)
        assert torch.equal(row.select(batch), row.unpack(row.targets))
        assert torch.equal(row.select(response_mask), row.response_mask)
        if row.input_ids.numel() > packer.micro_batch_tokens:
            assert len(set(row.tree.tolist())) == 1


def check_row(
    row: PackedRow,
    prompts: list[tuple[int, ...]],
    responses: list[tuple[int, ...]],
    packer: Packer,
) -> None:
    """Check that the predictor of a token sees exactly the token's past.

    The past follows from the mask, or from where positions start again.
    """
    ids, positions = row.input_ids[0], row.position_ids[0]
    if row.attention_mask is None:
        sequence = (positions == 0).cumsum(0)
        mask = (sequence[:, None] == sequence).tril()
    else:
        mask = row.attention_mask[0, 0]
    token = 0
    for number in row.response_index.tolist():
        path = [*prompts[number], *responses[number]]
        for t in range(len(responses[number])):
            seen = mask[row.predictors[token]]
            past = len(prompts[number]) + t
            assert ids[seen].tolist() == path[:past]
            assert positions[seen].tolist() == list(range(past))
            assert row.targets[token] == path[past]
            token += 1
        is_deep = packer.max_depth is not None and len(path) > packer.max_depth
        if is_deep or packer.layout == Layout.SEQUENCES:
            assert row.attention_mask is None
    assert token == len(row.targets) == len(row.predictors)
    if all(responses[number] for number in row.response_index.tolist()):
        ends = [[*prompts[number], *responses[number]] for number in row.response_index.tolist()]
        seen_at_the_end = [ids[mask[position]].tolist() for position in row.last_tokens]
        assert seen_at_the_end == ends


def test_a_predicting_row_by_hand() -> None:
    one_token = PromptTree(prompt=(13,), responses=((40,), (50,)))
    (row,) = predicting_rows(Packer(micro_batch_tokens=64), [EXAMPLE, one_token])
    # Neither the last token of a response is read, nor any of a response of one token.
    assert row.input_ids.tolist() == [[10, 11, 12, 20, 30, 31, 13]]
    assert row.targets.tolist() == [20, 21, 30, 31, 32, 40, 50]
    assert row.predictors.tolist() == [2, 3, 2, 4, 5, 6, 6]
    assert row.response_mask.sum(1).tolist() == [2, 3, 1, 1]


@pytest.mark.parametrize(
    ("architecture", "attention", "layout"), [*PACKED, ("llama", "sdpa", Layout.ALONE)]
)
def test_predicting_rows_equal_separate_passes(
    architecture: str, attention: Attention, layout: Layout
) -> None:
    policy = tiny_policy_of(architecture, attention=attention)
    trees = [*random_trees(), PromptTree((5, 6), ((7,), (8,), (9, 10)))]
    eager = policy.dtype if attention == "eager" else None
    packer = Packer(24, layout, mask_dtype=eager)
    rows = predicting_rows(packer, trees)
    parts = [response_likelihoods(policy, row) for row in rows]
    logprobs = assemble(
        rows, [row.unpack(part.logprobs) for row, part in zip(rows, parts, strict=True)]
    )
    for found, expected in zip(logprobs, separate_logprobs(policy, trees), strict=True):
        torch.testing.assert_close(found[: len(expected)], expected, rtol=0, atol=1e-5)
        assert not found[len(expected) :].any()
