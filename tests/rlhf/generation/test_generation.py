"""Compares the sampler with transformers' own, and its distribution with the softmax."""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from rlhf.generation.decoder import decoding_mode_for
from rlhf.generation.engines import generate
from rlhf.generation.hf import draw
from rlhf.generation.interface import Decoding, Samples
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.passes import compute_logprobs
from rlhf.training.nonfinite import NonFiniteError
from tests.rlhf.tiny_models import VOCAB, tiny_policy_of

DECODING = Decoding(end_id=7, max_new_tokens=16, temperature=1.0)
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "mistral", "gemma3_text", "opt"]


def uneven_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 11, 1, 7, 7, 2, 5, 9]
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def greedy_of_transformers(
    policy: Any, prompt: list[int], end_id: int, num_tokens: int
) -> list[int]:
    output = policy.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=num_tokens,
        eos_token_id=end_id,
        pad_token_id=2,
    )
    return output[0, len(prompt) :].tolist()


def greedy(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    batch_size: int = 8,
    generator: torch.Generator | None = None,
    **changes: Any,
) -> list[list[int]]:
    decoding = replace(Decoding(end_id=1, max_new_tokens=12, temperature=0), **changes)
    settings = GenerationSettings(batch_size=batch_size)
    return generate(policy, prompts, settings, decoding, generator).responses


def frequent_end(policy: PreTrainedModel) -> int:
    """Return an end token that greedy decoding hits early in some responses and late in others."""
    responses = greedy(policy, uneven_prompts(), end_id=-1)
    tokens = itertools.chain.from_iterable(responses)
    found = {token: [r.index(token) for r in responses if token in r] for token in set(tokens)}
    return max(found, key=lambda token: (len(set(found[token])), len(found[token]), token))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_equals_transformers(architecture: str) -> None:
    policy = tiny_policy_of(architecture)
    prompts = uneven_prompts()
    end_id = frequent_end(policy)
    responses = greedy(policy, prompts, end_id=end_id)
    assert responses == [greedy_of_transformers(policy, p, end_id, 12) for p in prompts]
    assert len({len(response) for response in responses}) > 2, "no response left the batch early"


def test_every_end_ends_a_response() -> None:
    policy = tiny_policy_of("llama")
    prompts = uneven_prompts()
    whole = greedy(policy, prompts, end_id=-1)
    ends = (frequent_end(policy), whole[0][3])
    cut = [
        response[: min(response.index(end) for end in ends if end in response) + 1]
        if set(ends) & set(response)
        else response
        for response in whole
    ]
    assert len({response[-1] for response in cut} & set(ends)) == 2
    for end_id, other in (ends, ends[::-1]):
        assert greedy(policy, prompts, end_id=end_id, other_ends=(other,)) == cut


@pytest.mark.parametrize("architecture", ["mistral", "gemma3_text"])
def test_greedy_equals_transformers_beyond_the_window(architecture: str) -> None:
    policy = tiny_policy_of(architecture, sliding_window=6)
    prompts = uneven_prompts()
    end_id = frequent_end(policy)
    responses = greedy(policy, prompts, end_id=end_id)
    assert responses == [greedy_of_transformers(policy, p, end_id, 12) for p in prompts]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_compaction_and_batch_size_change_nothing(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = tiny_policy_of(architecture)
    prompts = uneven_prompts()
    end_id = frequent_end(policy)
    expected = greedy(policy, prompts, end_id=end_id)
    assert sum(response[-1] == end_id for response in expected) >= 2
    for batch_size in (1, 3, 100):
        assert greedy(policy, prompts, end_id=end_id, batch_size=batch_size) == expected
    for cost in (0.0, 1e9):
        monkeypatch.setattr("rlhf.generation.hf.COPY_COST", cost)
        assert greedy(policy, prompts, end_id=end_id) == expected


def test_finished_responses_stop_costing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every loop must decode one row for each token of the responses.

    Rows decoded and rows copied stay within 1.5 times that number, and decoding ends with the
    longest response.
    """
    policy = tiny_policy_of("llama")
    decoding_mode_for(policy)  # it decodes a probe, which must not count
    decoded: list[int] = []
    copied: list[int] = []
    policy.register_forward_pre_hook(
        lambda _, args, inputs: decoded.append(len(inputs["input_ids"])), with_kwargs=True
    )
    select = DynamicCache.reorder_cache

    def noted(cache: DynamicCache, rows: torch.LongTensor) -> None:
        copied.append(len(rows))
        select(cache, rows)

    monkeypatch.setattr(DynamicCache, "reorder_cache", noted)
    responses = sample(policy, [[5, 6, 7]] * 48, end_id=7, max_new_tokens=60, batch_size=48)[0]
    lengths = [len(response) for response in responses]
    assert len(decoded) == max(lengths) == 60
    assert max(lengths) * len(lengths) > 1.7 * sum(lengths)  # the cost with finished rows
    assert sum(lengths) <= sum(decoded) <= 1.2 * sum(lengths)
    assert sum(decoded) + sum(copied) <= 1.5 * sum(lengths)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_logprobs_are_those_of_a_packed_pass(architecture: str, temperature: float) -> None:
    policy = tiny_policy_of(architecture)
    prompts = uneven_prompts()
    end_id = frequent_end(policy)
    samples = sample(policy, prompts, end_id=end_id, temperature=temperature)
    assert len({len(response) for response in samples.responses}) > 2
    trees = [
        PromptTree(tuple(prompt), (tuple(response),))
        for prompt, response in zip(prompts, samples.responses, strict=True)
    ]
    expected = compute_logprobs(policy, trees, Packer(1000), temperature=temperature or 1.0)
    for row, logprobs in zip(expected, samples.logprobs, strict=True):
        assert torch.tensor(logprobs) == pytest.approx(row[: len(logprobs)], abs=2e-5)
        assert not row[len(logprobs) :].any()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_softmax(temperature: float) -> None:
    policy = tiny_policy_of("llama")
    prompts = [[5, 6, 7], [30, 8, 9, 12, 11]]
    num_samples = 3000
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    responses = sample(
        policy, repeated, max_new_tokens=1, temperature=temperature, batch_size=1000
    ).responses
    tokens = torch.tensor(responses).view(2, num_samples)
    for prompt, sampled in zip(prompts, tokens, strict=True):
        with torch.no_grad():
            logits = policy(input_ids=torch.tensor([prompt])).logits[0, -1]
        expected = num_samples * (logits / temperature).softmax(-1)
        counts = torch.bincount(sampled, minlength=VOCAB)
        frequent = expected >= 5
        observed = torch.cat([counts[frequent], counts[~frequent].sum()[None]])
        expected = torch.cat([expected[frequent], expected[~frequent].sum()[None]])
        chi_square = ((observed - expected) ** 2 / expected).sum().item()
        freedom = len(expected) - 1
        assert freedom > 10
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # mean and 4 deviations


def test_a_token_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).repeat(4, 1)
    numbers = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-53], dtype=torch.double)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *_, **__: numbers)
    assert draw(probabilities, None).tolist() == [1, 1, 3, 3]


def test_second_tokens_follow_the_first() -> None:
    """Near temperature 0 sampling is greedy decoding, if the cache holds the row's own tokens."""
    policy = tiny_policy_of("gpt2")
    prompts = uneven_prompts()
    cold = greedy(policy, prompts, temperature=1e-4, generator=torch.Generator().manual_seed(0))
    assert cold == greedy(policy, prompts)


def sample(
    policy: PreTrainedModel,
    prompts: list[list[int]],
    batch_size: int = 6,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
    **changes: Any,
) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    settings = GenerationSettings(batch_size=batch_size)
    return generate(policy, prompts, settings, replace(DECODING, **changes), generator, progress)


def sampled(seed: int, **arguments: Any) -> list[list[int]]:
    prompts = uneven_prompts() * 2
    return sample(tiny_policy_of("llama"), prompts, seed=seed, **arguments).responses


def test_same_seed_same_tokens() -> None:
    first = sampled(0)
    torch.rand(3)
    assert sampled(0) == first
    assert sampled(1) != first


def test_end_token_is_last_and_length_is_cut() -> None:
    responses = sampled(0)
    finished = [response for response in responses if response[-1] == 7]
    cut = [response for response in responses if response[-1] != 7]
    assert len(finished) > 3
    assert len(cut) > 3
    assert all(response.count(7) == 1 for response in finished)
    assert all(len(response) == 16 and 7 not in response for response in cut)
    assert all(len(response) <= 16 for response in finished)


def test_draws_take_the_given_generator_only() -> None:
    policy = tiny_policy_of("llama")
    before = torch.get_rng_state()
    sample(policy, [[5, 6]])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_stays_as_it_was() -> None:
    policy = tiny_policy_of("gpt2", attention="eager")
    sample(policy, [[5, 6]])
    assert policy.config._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_no_numbers_are_refused(temperature: float) -> None:
    policy = tiny_policy_of("llama")
    with torch.no_grad():
        policy.lm_head.weight[7] = math.nan
    with pytest.raises(NonFiniteError, match="logits is not finite in phase rollout"):
        sample(policy, [[5, 6]], temperature=temperature)


def test_progress_counts_every_prompt() -> None:
    done: list[int] = []
    responses = sampled(0, progress=done.append)
    assert sum(done) == len(responses) == 16
    # in every step, so that the bar moves at once
    batches = [[len(response) for response in responses[i : i + 6]] for i in (0, 6, 12)]
    assert len(done) == sum(max(lengths) for lengths in batches)


def test_no_prompts_and_no_tokens() -> None:
    policy = tiny_policy_of("llama")
    assert greedy(policy, []) == []
    assert greedy(policy, [[5], [6, 7]], max_new_tokens=0) == [[], []]


def test_a_response_is_over_where_the_caller_says_so() -> None:
    policy = tiny_policy_of("llama")
    whole = greedy(policy, uneven_prompts(), end_id=-1)
    stopped = greedy(
        policy, uneven_prompts(), end_id=-1, is_over=lambda response: response[-1] % 5 == 0
    )
    expected = []
    for response in whole:
        ends = [place for place, token in enumerate(response) if token % 5 == 0]
        expected.append(response[: ends[0] + 1] if ends else response)
    assert stopped == expected
    assert len({len(response) for response in stopped}) > 2
