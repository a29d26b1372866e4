"""The sampler against transformers' own, and its distribution against the softmax."""

import itertools
import math
import re
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache

import rlhf.generation.auto
from rlhf.generation.auto import FastestEngine
from rlhf.generation.decoder import way_for
from rlhf.generation.engines import generate, make_engine
from rlhf.generation.hf import draw
from rlhf.generation.interface import Decoding, Samples
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.passes import compute_logprobs
from rlhf.training.nonfinite import NonFiniteError
from tests.rlhf.tiny_models import VOCAB, tiny_policy_of

ENGINES = ["hf", "continuous"]
"""Those that run here; vllm has a test of its own."""
DECODING = Decoding(end_id=7, max_new_tokens=16, temperature=1.0)
ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "mistral", "gemma3_text", "opt"]


def uneven_prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 11, 1, 7, 7, 2, 5, 9]
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def greedy_of_transformers(policy, prompt: list[int], end_id: int, num_tokens: int) -> list[int]:
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
    policy, prompts: list[list[int]], engine="hf", batch_size: int = 8, generator=None, **changes
) -> list[list[int]]:
    decoding = replace(Decoding(end_id=1, max_new_tokens=12, temperature=0), **changes)
    settings = GenerationSettings(engine=engine, batch_size=batch_size)
    return generate(policy, prompts, settings, decoding, generator).responses


def frequent_end(policy) -> int:
    """An end token that greedy decoding hits early in some responses and late in others."""
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


@pytest.mark.parametrize("engine", ["hf", "continuous"])
def test_every_end_ends_a_response(engine: str) -> None:
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
        assert greedy(policy, prompts, engine, end_id=end_id, other_ends=(other,)) == cut


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
    """Rows decoded and rows copied stay within 1.5 times the tokens of the responses, which no loop
    can do without, and decoding ends with the longest response."""
    policy = tiny_policy_of("llama")
    way_for(policy)  # its probe decodes too
    decoded, copied = [], []
    policy.register_forward_pre_hook(
        lambda _, args, inputs: decoded.append(len(inputs["input_ids"])), with_kwargs=True
    )
    select = DynamicCache.reorder_cache
    monkeypatch.setattr(
        DynamicCache,
        "reorder_cache",
        lambda cache, rows: copied.append(len(rows)) or select(cache, rows),
    )
    responses = sample(policy, [[5, 6, 7]] * 48, end_id=7, max_new_tokens=60, batch_size=48)[0]
    lengths = [len(response) for response in responses]
    assert len(decoded) == max(lengths) == 60
    assert max(lengths) * len(lengths) > 1.7 * sum(lengths)  # what a loop without the care costs
    assert sum(lengths) <= sum(decoded) <= 1.2 * sum(lengths)
    assert sum(decoded) + sum(copied) <= 1.5 * sum(lengths)


@pytest.mark.parametrize("batch_size", [3, 100])
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mistral"])
def test_continuous_batching_takes_the_same_tokens(architecture: str, batch_size: int) -> None:
    policy = tiny_policy_of(architecture)
    prompts = uneven_prompts()
    end_id = frequent_end(policy)
    arguments = {"end_id": end_id, "batch_size": batch_size}
    assert greedy(policy, prompts, "continuous", **arguments) == greedy(
        policy, prompts, **arguments
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 0.6, 0])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_logprobs_are_those_of_a_packed_pass(
    architecture: str, temperature: float, engine: str
) -> None:
    policy = tiny_policy_of(architecture)
    prompts = uneven_prompts()
    end_id = frequent_end(policy)
    samples = sample(policy, prompts, engine, end_id=end_id, temperature=temperature)
    assert len({len(response) for response in samples.responses}) > 2
    trees = [
        PromptTree(tuple(prompt), (tuple(response),))
        for prompt, response in zip(prompts, samples.responses, strict=True)
    ]
    expected = compute_logprobs(policy, trees, Packer(1000), temperature=temperature or 1.0)
    for row, logprobs in zip(expected, samples.logprobs, strict=True):
        assert torch.tensor(logprobs) == pytest.approx(row[: len(logprobs)], abs=2e-5)
        assert not row[len(logprobs) :].any()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_softmax(temperature: float, engine: str) -> None:
    policy = tiny_policy_of("llama")
    prompts = [[5, 6, 7], [30, 8, 9, 12, 11]]
    num_samples = 3000
    repeated = [prompt for prompt in prompts for _ in range(num_samples)]
    responses = sample(
        policy, repeated, engine, max_new_tokens=1, temperature=temperature, batch_size=1000
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
        assert chi_square < freedom + 4 * (2 * freedom) ** 0.5  # mean and deviation of chi-square


def test_a_token_without_probability_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).repeat(4, 1)
    numbers = torch.tensor([0.0, 0.4999999, 0.5, 1 - 2**-53], dtype=torch.double)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *_, **__: numbers)
    assert draw(probabilities, None).tolist() == [1, 1, 3, 3]


def test_second_tokens_follow_the_first() -> None:
    """With almost no temperature, sampling is greedy decoding: the cache holds the own tokens."""
    policy = tiny_policy_of("gpt2")
    prompts = uneven_prompts()
    cold = greedy(policy, prompts, temperature=1e-4, generator=torch.Generator().manual_seed(0))
    assert cold == greedy(policy, prompts)


def sample(
    policy,
    prompts: list[list[int]],
    engine="hf",
    batch_size: int = 6,
    seed: int = 0,
    progress=None,
    **changes,
) -> Samples:
    generator = torch.Generator().manual_seed(seed)
    settings = GenerationSettings(engine=engine, batch_size=batch_size)
    return generate(policy, prompts, settings, replace(DECODING, **changes), generator, progress)


def sampled(seed: int, engine: str = "hf", **arguments) -> list[list[int]]:
    prompts = uneven_prompts() * 2
    return sample(tiny_policy_of("llama"), prompts, engine, seed=seed, **arguments).responses


@pytest.mark.parametrize("engine", ENGINES)
def test_same_seed_same_tokens(engine: str) -> None:
    first = sampled(0, engine)
    torch.rand(3)
    assert sampled(0, engine) == first
    assert sampled(1, engine) != first


@pytest.mark.parametrize("engine", ENGINES)
def test_end_token_is_last_and_length_is_cut(engine: str) -> None:
    responses = sampled(0, engine)
    finished = [response for response in responses if response[-1] == 7]
    cut = [response for response in responses if response[-1] != 7]
    assert len(finished) > 3
    assert len(cut) > 3
    assert all(response.count(7) == 1 for response in finished)
    assert all(len(response) == 16 and 7 not in response for response in cut)
    assert all(len(response) <= 16 for response in finished)


@pytest.mark.parametrize("engine", ENGINES)
def test_draws_take_the_given_generator_only(engine: str) -> None:
    policy = tiny_policy_of("llama")
    before = torch.get_rng_state()
    sample(policy, [[5, 6]], engine)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_model_stays_as_it_was(engine: str) -> None:
    policy = tiny_policy_of("gpt2", attention="eager")
    sample(policy, [[5, 6]], engine)
    assert policy.config._attn_implementation == "eager"
    assert all(parameter.requires_grad for parameter in policy.parameters())


@pytest.mark.parametrize("temperature", [0, 1.0])
@pytest.mark.parametrize("engine", ENGINES)
def test_logits_that_are_no_numbers_are_refused(engine: str, temperature: float) -> None:
    policy = tiny_policy_of("llama")
    with torch.no_grad():
        policy.lm_head.weight[7] = math.nan
    with pytest.raises(NonFiniteError, match="logits is not finite in phase rollout"):
        sample(policy, [[5, 6]], engine, temperature=temperature)


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_counts_every_prompt(engine: str) -> None:
    done: list[int] = []
    responses = sampled(0, engine, progress=done.append)
    assert sum(done) == len(responses) == 16
    if engine == "hf":  # in every step, so that nobody waits long for a sign of life
        batches = [[len(response) for response in responses[i : i + 6]] for i in (0, 6, 12)]
        assert len(done) == sum(max(lengths) for lengths in batches)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_prompts_and_no_tokens(engine: str) -> None:
    policy = tiny_policy_of("llama")
    assert greedy(policy, [], engine) == []
    assert greedy(policy, [[5], [6, 7]], engine, max_new_tokens=0) == [[], []]


class SlowEngine:
    """Takes the given seconds by a clock that all share, then none; answers with its own token."""

    now: ClassVar[float] = 0.0

    def __init__(self, seconds: list[float], token: int) -> None:
        self.seconds, self.token = seconds, token
        self.prompts: list[int] = []
        self.refreshed = 0

    def refresh(self, policy) -> None:
        self.refreshed += 1

    def generate(self, prompts, *_) -> Samples:
        self.prompts.append(len(prompts))
        SlowEngine.now += self.seconds.pop(0) if self.seconds else 0.0
        return Samples([[self.token]] * len(prompts), [[0.0]] * len(prompts))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.generation.auto.time, "perf_counter", lambda: SlowEngine.now)


def test_the_engine_that_is_faster_the_second_time_samples_from_then_on(clock: None) -> None:
    first, second = SlowEngine([0.0, 0.2], token=5), SlowEngine([0.3, 0.0], token=6)
    lines: list[str] = []
    engine = FastestEngine({"one": first, "two": second}, batch_size=2, tell=lines.append)
    for _ in range(2):
        engine.refresh(tiny_policy_of("llama"))
        assert engine.generate([[5]] * 9, DECODING).responses == [[6]] * 9
    assert (first.prompts, second.prompts) == ([4, 4], [4, 4, 9, 9])
    assert (first.refreshed, second.refreshed) == (1, 2)
    [line] = lines
    assert line == "generation: 4 responses took one 0.20 s, two 0.00 s; two samples"


def test_a_resumed_run_keeps_the_engine_that_the_clock_chose(clock: None) -> None:
    slow, fast = SlowEngine([0.0, 0.2], token=5), SlowEngine([], token=6)
    engine = FastestEngine({"slow": slow, "fast": fast}, batch_size=2, tell=print)
    before = engine.state_dict()
    engine.generate([[5]], DECODING)
    resumed = FastestEngine({"slow": SlowEngine([], 7), "fast": SlowEngine([0.3], 8)}, 2, print)
    resumed.load_state_dict(before)
    assert resumed.chosen is None
    resumed.load_state_dict(engine.state_dict())
    assert resumed.generate([[5]], DECODING).responses == [[8]]


def test_the_trial_takes_no_draw_of_the_run() -> None:
    policy, lines = tiny_policy_of("llama"), []
    engine = make_engine(GenerationSettings(engine="auto", batch_size=2), lines.append)
    engine.refresh(policy)
    generator = torch.Generator().manual_seed(0)
    before = torch.get_rng_state()
    responses = engine.generate(uneven_prompts(), DECODING, generator).responses
    assert torch.equal(torch.get_rng_state(), before)
    [name] = re.findall(r"; (\w+) samples", lines[0])
    assert responses == sample(policy, uneven_prompts(), name, batch_size=2).responses
