"""Provides the engine `hf`: our own loop over the model's cache, which drops finished responses."""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf.generation.cpu_products import transposed_linear_layers
from rlhf.generation.decoder import Decoder, DecodingMode, decoding_mode_for
from rlhf.generation.half_weights import half_weights
from rlhf.generation.interface import Decoding, Samples
from rlhf.generation.settings import GenerationSettings
from rlhf.training.nonfinite import NonFiniteError

COPY_COST = 1.0
"""Cost of copying a row of the cache, in decoded tokens. From 0.5 to 2, the value changes the total
cost by at most 3 % for responses of 16 to 256 tokens."""


class LoopEngine:
    """Decodes prompts of similar length together until the last of them is finished.

    Rows leave the batch after their responses end. Waiting prompts do not take their place. The
    loop keeps only the tokens of each step and their log-probabilities, not the scores.
    """

    copies_weights = False

    def __init__(self, settings: GenerationSettings) -> None:
        self.batch_size = settings.batch_size
        self.policy: PreTrainedModel

    def refresh(self, policy: PreTrainedModel) -> None:
        self.policy = policy

    def release(self) -> None:
        """Do nothing, because `generate` frees its own memory."""

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        generator: torch.Generator | None = None,
        progress: Callable[[int], object] | None = None,
    ) -> Samples:
        """See `Engine.generate`."""
        device = next(self.policy.parameters()).device
        draws = _on_device(generator, device)
        mode = decoding_mode_for(self.policy)
        samples = Samples([[] for _ in prompts], [[] for _ in prompts])
        for chosen in _batches(prompts, self.batch_size, mode):
            some_prompts = [prompts[i] for i in chosen]
            with half_weights(self.policy), transposed_linear_layers(self.policy):
                decoder = Decoder(self.policy, some_prompts, mode)
                batch = _generate_batch(
                    decoder, len(some_prompts), decoding, draws, progress or (lambda _: None)
                )
            for i, response, logprobs in zip(chosen, *batch, strict=True):
                samples.responses[i], samples.logprobs[i] = response, logprobs
        return samples


def _batches(
    prompts: Sequence[Sequence[int]], batch_size: int, mode: DecodingMode
) -> Iterator[list[int]]:
    """Yield numbers of prompts of similar length, or of one length if the mode cannot pad."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    groups = [order]
    if not mode.pads:
        groups = [list(group) for _, group in groupby(order, key=lambda i: len(prompts[i]))]
    for group in groups:
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def _generate_batch(
    decoder: Decoder,
    num_prompts: int,
    decoding: Decoding,
    generator: torch.Generator | None,
    progress: Callable[[int], object],
) -> Samples:
    samples = Samples([[] for _ in range(num_prompts)], [[] for _ in range(num_prompts)])
    active = list(range(num_prompts))  # the prompt of each row of the batch
    unfinished = set(active)
    num_wasted = 0  # tokens decoded in finished rows since rows were last removed
    ends = set(decoding.ends)
    for step in range(decoding.max_new_tokens):
        tokens, logprobs = _sample(decoder.logits(), decoding.temperature, generator)
        num_before = len(unfinished)
        # The loop waits for the device only here. float32 holds every token id (below 2**24).
        read_tokens, read_logprobs = torch.stack([tokens.to(logprobs.dtype), logprobs]).tolist()
        # One NaN among the logits makes all probabilities of their row NaN.
        if any(map(math.isnan, read_logprobs)):
            raise NonFiniteError("logits", "rollout")
        for prompt, token, logprob in zip(
            active, map(int, read_tokens), read_logprobs, strict=True
        ):
            if prompt in unfinished:
                samples.responses[prompt].append(token)
                samples.logprobs[prompt].append(logprob)
                response = samples.responses[prompt]
                if token in ends or (decoding.is_over is not None and decoding.is_over(response)):
                    unfinished.remove(prompt)
        if not unfinished or step == decoding.max_new_tokens - 1:
            progress(num_before)  # responses cut at full length have ended too
            break
        progress(num_before - len(unfinished))
        decoder.append(tokens)
        # Remove rows once they have wasted as much as their removal costs (the ski rental rule).
        # The total is at most twice the best possible cost, whatever the lengths.
        num_wasted += len(active) - len(unfinished)
        if num_wasted >= COPY_COST * len(unfinished):
            kept = [row for row, prompt in enumerate(active) if prompt in unfinished]
            active, num_wasted = [active[row] for row in kept], 0
            decoder.keep(torch.tensor(kept).to(tokens.device, non_blocking=True))
    return samples


def _sample(
    logits: Tensor, temperature: float, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row and return it with its log-probability in float32, both (rows,)."""
    probabilities = (logits.float() / (temperature or 1.0)).softmax(-1)
    tokens = logits.argmax(-1) if temperature == 0 else draw(probabilities, generator)
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(1).log()


def draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw one token per row (rows,) from probabilities (rows, vocab), by one uniform number.

    torch.multinomial draws a number for every token of the vocabulary, which takes a quarter of a
    decoding step of SmolLM2-135M on a CPU.
    """
    up_to = probabilities.double().cumsum(-1)
    shape, device = (len(probabilities), 1), probabilities.device
    uniform = torch.rand(shape, generator=generator, dtype=torch.double, device=device)
    tokens = torch.searchsorted(up_to, uniform * up_to[:, -1:], right=True)
    return tokens.squeeze(1).clamp(max=probabilities.shape[-1] - 1)


def _on_device(generator: torch.Generator | None, device: torch.device) -> torch.Generator | None:
    """Return a generator on the device, so that probabilities need not be copied to the CPU.

    The given generator seeds it."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**63 - 1, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)
