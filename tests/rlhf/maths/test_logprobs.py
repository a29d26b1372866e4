import math
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf.maths.logprobs
from rlhf.maths.logprobs import (
    chunked_divergence,
    chunked_likelihoods,
    chunked_logprobs,
    chunked_moments,
    token_logprobs,
)

# Two tokens over a vocabulary of three: softmax (1/8, 2/8, 5/8) and (1/3, 1/3, 1/3).
LOGITS = torch.tensor([[math.log(1), math.log(2), math.log(5)], [7.0, 7.0, 7.0]])


def test_hand_worked_logprobs() -> None:
    logprobs = token_logprobs(LOGITS, torch.tensor([2, 0]))
    expected = torch.tensor([math.log(5 / 8), -math.log(3)])
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)


def test_temperature_divides_the_logits() -> None:
    # At temperature 1/2 the weights are squared: 1, 4, 25 of 30.
    logprobs = token_logprobs(LOGITS, torch.tensor([1, 1]), temperature=0.5)
    expected = torch.tensor([math.log(4 / 30), -math.log(3)])
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-6)


def test_equals_log_softmax_with_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, 17, generator=generator)).requires_grad_()
    weights = torch.randn(2, 5, generator=generator)
    targets = torch.randint(17, (2, 5), generator=generator)
    expected = -torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view(2, 5)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), logits)
    logprobs = token_logprobs(logits, targets)
    (gradient,) = torch.autograd.grad((logprobs * weights).sum(), logits)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-5)


def test_half_precision_logits_are_read_in_fp32() -> None:
    logits = torch.tensor([[10.0, 0.0]], dtype=torch.bfloat16)
    logprobs = token_logprobs(logits, torch.tensor([0]))
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs, torch.tensor([-math.log1p(math.exp(-10))]))


def test_moments_by_hand() -> None:
    """The surprises of (1/8, 2/8, 5/8) are 3, 2 and 3 - log2 5 bits."""
    moments = chunked_moments(LOGITS, torch.tensor([2, 0]), torch.nn.Identity())
    bit = math.log(2)
    surprises = [3 * bit, 2 * bit, (3 - math.log2(5)) * bit]
    entropy = sum(p * s for p, s in zip((1 / 8, 2 / 8, 5 / 8), surprises, strict=True))
    squares = sum(p * s * s for p, s in zip((1 / 8, 2 / 8, 5 / 8), surprises, strict=True))
    expected = torch.tensor([entropy, math.log(3)])
    torch.testing.assert_close(moments.entropy, expected, rtol=0, atol=1e-6)
    expected = torch.tensor([squares - entropy**2, 0.0])
    torch.testing.assert_close(moments.variance, expected, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = chunked_moments(LOGITS, torch.tensor([2, 0]), torch.nn.Identity())
    torch.testing.assert_close(mixed.variance, expected, rtol=0, atol=1e-6)
    expected = token_logprobs(LOGITS, torch.tensor([2, 0]))
    torch.testing.assert_close(moments.logprobs, expected, rtol=0, atol=1e-6)


def test_moments_in_chunks_and_with_impossible_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(7, 5, generator=generator)
    logits[:, 3] = -math.inf
    targets = torch.zeros(7, dtype=torch.long)
    moments = partial(chunked_moments, targets=targets, head=torch.nn.Identity(), temperature=0.7)
    whole = moments(logits)
    monkeypatch.setattr(rlhf.maths.logprobs, "CHUNK_TOKENS", 3)
    for part, again in zip(whole, moments(logits), strict=True):
        assert part.isfinite().all()
        torch.testing.assert_close(part, again, rtol=0, atol=1e-6)
    four = moments(logits[:, [0, 1, 2, 4]])
    torch.testing.assert_close(whole, four, rtol=0, atol=1e-6)


def test_chunks_change_neither_values_nor_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(7, 4, generator=generator, requires_grad=True)
    unembedding = torch.randn(11, 4, generator=generator, requires_grad=True)
    targets = torch.randint(11, (7,), generator=generator)
    weights = torch.randn(7, generator=generator)
    whole = ((features @ unembedding.T) / 0.7).log_softmax(-1)[range(7), targets]
    expected = torch.autograd.grad((whole * weights).sum(), (features, unembedding))
    monkeypatch.setattr(rlhf.maths.logprobs, "CHUNK_TOKENS", 3)
    logprobs = chunked_logprobs(features, targets, lambda chunk: chunk @ unembedding.T, 0.7)
    found = torch.autograd.grad((logprobs * weights).sum(), (features, unembedding))
    torch.testing.assert_close(logprobs, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_no_more_than_a_chunk_of_logits_is_ever_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor has the vocabulary's width for more tokens than a chunk.

    This holds for all that is computed, and for all that autograd keeps between the passes.
    """
    monkeypatch.setattr(rlhf.maths.logprobs, "CHUNK_TOKENS", 8)
    features = torch.randn(50, 4, requires_grad=True)
    head = torch.nn.Linear(4, 101, bias=False)
    targets = torch.zeros(50, dtype=torch.long)
    with LargestLogits(vocab=101) as seen:
        chunked_logprobs(features, targets, head).sum().backward()
    assert seen.tokens == 8
    assert seen.kept == 0


def test_divergence_by_hand() -> None:
    """The teacher gives (1/8, 2/8, 5/8), the student thirds; then the other way round."""
    identity = torch.nn.Identity()
    students = LOGITS.flip(0).requires_grad_()
    divergence = chunked_divergence(LOGITS, identity, students, identity)
    to_thirds = sum(p * math.log(3 * p) for p in (1 / 8, 2 / 8, 5 / 8))
    from_thirds = sum(math.log(8 / (3 * count)) / 3 for count in (1, 2, 5))
    expected = torch.tensor([to_thirds, from_thirds])
    torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(divergence.sum(), students)
    expected = LOGITS.flip(0).softmax(-1) - LOGITS.softmax(-1)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)


def test_a_student_like_its_teacher_learns_nothing() -> None:
    """Tokens without probability, of either, change nothing."""
    logits = torch.tensor([[0.3, -math.inf, 2.0, 30.0]], requires_grad=True)
    divergence = chunked_divergence(logits, torch.nn.Identity(), logits, torch.nn.Identity())
    assert divergence.tolist() == [0.0]
    (gradient,) = torch.autograd.grad(divergence.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros(1, 4), rtol=0, atol=1e-7)
    without = torch.tensor([[0.3, 1.0, 2.0, -math.inf]])
    taught = torch.tensor([[0.3, -math.inf, 2.0, -math.inf]])
    divergence = chunked_divergence(taught, torch.nn.Identity(), without, torch.nn.Identity())
    kept = without[:, [0, 1, 2]].softmax(-1)
    expected = -(kept[:, 0] + kept[:, 2]).log()  # of two tokens that keep their ratio
    torch.testing.assert_close(divergence, expected, rtol=0, atol=1e-6)


def test_chunks_of_a_divergence_change_neither_values_nor_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rlhf.maths.logprobs, "CHUNK_TOKENS", 3)
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(7, 3, generator=generator, requires_grad=True)
    unembedding = torch.randn(11, 3, generator=generator, requires_grad=True)
    taught = torch.randn(7, 2, generator=generator, requires_grad=True)
    teacher = torch.randn(11, 2, generator=generator, requires_grad=True)
    weights = torch.randn(7, generator=generator)
    whole = torch.nn.functional.kl_div(
        (features @ unembedding.T).log_softmax(-1),
        (taught @ teacher.T).detach().log_softmax(-1),
        reduction="none",
        log_target=True,
    ).sum(-1)
    expected = torch.autograd.grad((whole * weights).sum(), (features, unembedding))
    with LargestLogits(vocab=11) as seen:
        found = chunked_divergence(
            taught, lambda chunk: chunk @ teacher.T, features, lambda chunk: chunk @ unembedding.T
        )
        (found * weights).sum().backward()
    assert (seen.tokens, seen.kept) == (3, 0)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    torch.testing.assert_close((features.grad, unembedding.grad), expected, rtol=0, atol=1e-5)
    assert taught.grad is None and teacher.grad is None


class LargestLogits(TorchDispatchMode):
    """Records the most tokens of any tensor with the vocabulary's width.

    It also counts how many such tensors were alive when the backward pass began.
    """

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.tokens = 0
        self.kept = 0
        self._alive: WeakValueDictionary[int, torch.Tensor] = WeakValueDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.ones_like.default:  # the gradient of the loss: backward begins
            self.kept = len(self._alive)
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (self.vocab,):
            self.tokens = max(self.tokens, result.numel() // self.vocab)
            self._alive[id(result)] = result
        return result


def test_likelihoods_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rlhf.maths.logprobs, "CHUNK_TOKENS", 2)
    logits = LOGITS[[0, 0, 1]]
    likelihoods = chunked_likelihoods(logits, torch.tensor([2, 1, 0]), torch.nn.Identity())
    expected = torch.tensor([math.log(5 / 8), math.log(2 / 8), -math.log(3)])
    torch.testing.assert_close(likelihoods.logprobs, expected, rtol=0, atol=1e-6)
    # The last token is as likely as any other, so greedy decoding may take it.
    assert likelihoods.is_greedy.tolist() == [True, False, True]
