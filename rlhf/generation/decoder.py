"""Decodes several prompts at once, in the fastest mode that gives a policy's right logits."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from rlhf.models.architectures import accepted, accepts, num_embeddings
from rlhf.training.out_of_memory import is_device_error


@dataclass(frozen=True)
class DecodingMode:
    """Says how several prompts are decoded at once."""

    pads: bool
    """Whether prompts of different lengths share a batch, the shorter ones padded on the left."""
    caches: bool
    """Whether a cache is used. Otherwise every step computes the whole text again."""


DECODING_MODES = (
    DecodingMode(pads=True, caches=True),
    DecodingMode(pads=False, caches=True),
    DecodingMode(pads=False, caches=False),
)
"""All modes, fastest first. The last is right for every model: models are trained that way."""

MAX_ERROR_SHARE = 0.01
MAX_ERROR_SHARE_IN_HALF_PRECISION = 0.1
"""Largest difference between a mode and plain passes, as a share of the change when all earlier
tokens are left out (root mean squares of log-probabilities). Rounding is far below this share, one
lost token far above it."""

MAX_LOGPROB_DIFFERENCE = 1e-3
"""Largest difference of any log-probability in fp32."""

PROBE_STEPS = 5
"""Number of tokens that the test of a mode decodes."""

DEFAULT_CACHE_NAME = "past_key_values"
"""Argument of the forward pass that most models have for their cache."""

_modes: WeakKeyDictionary[nn.Module, DecodingMode] = WeakKeyDictionary()
"""Results of `decoding_mode_for`, kept for each policy."""


class Decoder:
    """Holds a batch whose rows grow by one token per step, and may be removed."""

    def __init__(
        self, policy: PreTrainedModel, prompts: Sequence[Sequence[int]], mode: DecodingMode
    ) -> None:
        assert mode.pads or len({len(prompt) for prompt in prompts}) == 1
        self._policy = policy
        self._mode = mode
        device = next(policy.parameters()).device
        self._ids, self._mask = (
            tensor.to(device, non_blocking=True) for tensor in left_pad(prompts)
        )
        self._positions = (self._mask.cumsum(1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=policy.config) if mode.caches else None

    def logits(self) -> Tensor:
        """Return the logits of the next token of every row (rows, vocab)."""
        inputs: dict[str, Any] = {"input_ids": self._ids}
        if self._cache is None:
            options = accepted(self._policy, use_cache=False, logits_to_keep=1)
        else:
            inputs[_cache_name(self._policy)] = self._cache
            options = accepted(
                self._policy,
                attention_mask=self._attention_mask(),
                position_ids=self._positions,
                use_cache=True,
                logits_to_keep=1,
            )
        # The router loss of a mixture of experts needs a mask as long as the ids, so turn it off.
        options |= accepted(self._policy, output_router_logits=False)
        return self._policy(**inputs, **options).logits[:, -1]

    def _attention_mask(self) -> Tensor | None:
        """Return the mask; None if nothing is padded.

        It is also None after a recurrent state has read the prompt, since the state has no
        positions to mask."""
        has_read = self._mask.shape[1] > self._ids.shape[1]
        is_state = _cache_name(self._policy) != DEFAULT_CACHE_NAME
        return None if not self._mode.pads or (has_read and is_state) else self._mask

    def append(self, tokens: Tensor) -> None:
        """Add one token to each row (rows,)."""
        self._mask = nn.functional.pad(self._mask, (0, 1), value=1)
        self._positions = self._positions[:, -1:] + 1
        fresh = tokens[:, None]
        self._ids = torch.cat([self._ids, fresh], 1) if self._cache is None else fresh

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self._ids, self._mask = self._ids[rows], self._mask[rows]
        self._positions = self._positions[rows]
        if self._cache is not None:
            # The only method that layers with a recurrent state have for this.
            self._cache.reorder_cache(rows)  # type: ignore[arg-type]


@torch.no_grad()
def decoding_mode_for(policy: PreTrainedModel) -> DecodingMode:
    """Return the first mode that gives the log-probabilities of plain passes.

    Plain passes read one row alone without a cache. The test adds tokens and removes a row, once
    per model. State space models and hybrids often fail it: padding gets into their state, or the
    cache does not return their state.
    """
    if policy not in _modes:
        device = next(policy.parameters()).device
        with torch.autocast(device.type, enabled=False):
            mode = next(
                mode
                for mode in DECODING_MODES
                if not mode.caches or _equals_plain_passes(policy, mode)
            )
        if mode is not DECODING_MODES[0]:
            how = "prompts of one length at a time" if mode.caches else "without a cache, slowly"
            warnings.warn(f"{type(policy).__name__} samples {how}", stacklevel=3)
        _modes[policy] = mode
    return _modes[policy]


def _equals_plain_passes(policy: PreTrainedModel, mode: DecodingMode) -> bool:
    """Return whether three prompts, continued by given tokens, give the logits of plain passes."""
    # Different lengths make the first mode pad. The ids vary between rows, and none is 0.
    lengths = (2, 9, 5) if mode.pads else (6, 6, 6)
    top = num_embeddings(policy) - 1
    texts = [
        [1 + (7 * i + 11 * row) % top for i in range(length + PROBE_STEPS)]
        for row, length in enumerate(lengths)
    ]
    try:
        found = _step_through(policy, texts, lengths, mode)
    except Exception as error:  # an architecture may raise anything if it does not know the cache
        if is_device_error(error):
            raise
        return False
    differences, effects = [], []
    for text, length, logprobs in zip(texts, lengths, found, strict=True):
        places = range(length - 1, length - 1 + len(logprobs))
        expected = _plain_logprobs(policy, [text])[0, list(places)]
        forgetful = _plain_logprobs(policy, [[text[place]] for place in places])[:, 0]
        differences.append(logprobs - expected)
        effects.append(forgetful - expected)
    difference, effect = torch.cat(differences), torch.cat(effects)
    if not effect.isfinite().all():
        return True  # nothing to compare; sampling reports that the logits are not finite
    is_full = policy.dtype == torch.float32
    share = MAX_ERROR_SHARE if is_full else MAX_ERROR_SHARE_IN_HALF_PRECISION
    largest = MAX_LOGPROB_DIFFERENCE if is_full else math.inf
    return bool(
        # 1e-7 allows for rounding in a model on which the history has no effect at all.
        _root_mean_square(difference) <= share * _root_mean_square(effect) + 1e-7
        and difference.abs().max() <= largest
    )


def _step_through(
    policy: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    mode: DecodingMode,
) -> list[Tensor]:
    """Return log-probabilities (steps, vocab) of each row; the second row is removed halfway."""
    decoder = Decoder(policy, [text[:n] for text, n in zip(texts, lengths, strict=True)], mode)
    active = list(range(len(texts)))
    found: list[list[Tensor]] = [[] for _ in texts]
    for step in range(PROBE_STEPS):
        logprobs = decoder.logits().float().log_softmax(-1)
        for row, values in zip(active, logprobs, strict=True):
            found[row].append(values)
        tokens = [texts[row][lengths[row] + step] for row in active]
        decoder.append(torch.tensor(tokens, device=logprobs.device))
        if step == PROBE_STEPS // 2:
            active = [0, 2]
            decoder.keep(torch.tensor(active, device=logprobs.device))
    return [torch.stack(values) for values in found]


def _plain_logprobs(policy: PreTrainedModel, texts: Sequence[Sequence[int]]) -> Tensor:
    """Return log-probabilities (batch, sequence, vocab) after every token of equal-length texts."""
    ids = torch.tensor(texts, device=next(policy.parameters()).device)
    options = accepted(policy, use_cache=False, output_router_logits=False)
    return policy(input_ids=ids, **options).logits.float().log_softmax(-1)


def _root_mean_square(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _cache_name(policy: PreTrainedModel) -> str:
    """Return the name of the cache in the forward pass; state space models have their own."""
    return "cache_params" if accepts(policy, "cache_params") else DEFAULT_CACHE_NAME


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Pad ids with zeros on the left, (batch, time), so that the next token follows each prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    mask = torch.arange(longest) >= longest - lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for prompt in prompts for token in prompt])
    return ids, mask.long()
