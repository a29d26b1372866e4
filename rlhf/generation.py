"""Sampling responses: finished responses leave the batch, and no scores are kept.

Sampling is from the whole softmax at one temperature. There is no top-k, top-p or repetition
penalty: with one, the log-probabilities that PPO computes would not be those of the policy that
sampled (recipe: checklist 15).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rlhf.finite import NonFiniteError

COMPACTION = 0.75
"""The batch is compacted once at most this share of its rows is still unfinished."""


@torch.no_grad()
def generate(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    end_id: int,
    max_new_tokens: int,
    temperature: float,
    batch_size: int,
    generator: torch.Generator | None = None,
    progress: Callable[[int], object] | None = None,
) -> list[list[int]]:
    """One response a prompt, as token ids.

    Args:
        prompts: token ids; repeat a prompt to get several samples of it.
        end_id: the end-of-response token; it is the last id of every response that finished.
        max_new_tokens: a response without its end token is cut here.
        temperature: logits are divided by it; 0 takes the likeliest token (greedy).
        batch_size: prompts decoded together, neighbours in length.
        generator: CPU generator of the draws; None: torch's own.
        progress: called with the number of prompts done.

    Raises:
        NonFiniteError: the policy's logits are no numbers.

    Returns:
        responses in the order of the prompts, without padding.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    responses: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        sampled = _generate_batch(
            policy, [prompts[i] for i in chosen], end_id, max_new_tokens, temperature, generator
        )
        for i, response in zip(chosen, sampled, strict=True):
            responses[i] = response
        if progress is not None:
            progress(len(chosen))
    return responses


def _generate_batch(
    policy: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    end_id: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
) -> list[list[int]]:
    device = next(policy.parameters()).device
    ids, attention_mask = (tensor.to(device) for tensor in _left_pad(prompts))
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    cache = DynamicCache(config=policy.config)
    responses: list[list[int]] = [[] for _ in prompts]
    active = list(range(len(prompts)))  # rows of the batch -> prompts
    unfinished = set(active)
    for step in range(max_new_tokens):
        logits = policy(
            input_ids=ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        tokens = _sample(logits, temperature, generator)
        for prompt, token in zip(active, tokens.tolist(), strict=True):
            if prompt in unfinished:
                responses[prompt].append(token)
                if token == end_id:
                    unfinished.remove(prompt)
        if not unfinished or step == max_new_tokens - 1:
            break
        positions = positions[:, -1:] + 1
        attention_mask = torch.nn.functional.pad(attention_mask, (0, 1), value=1)
        if len(unfinished) <= COMPACTION * len(active):
            kept = [row for row, prompt in enumerate(active) if prompt in unfinished]
            active = [active[row] for row in kept]
            rows = torch.tensor(kept, device=device)
            cache.batch_select_indices(rows)
            tokens, positions = tokens[rows], positions[rows]
            attention_mask = attention_mask[rows]
        ids = tokens[:, None]
    return responses


def _sample(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    """One token a row, (rows,)."""
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1).cpu()
    if probabilities.isnan().any():
        raise NonFiniteError("logits", "rollout")
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(1).to(logits.device)


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Ids with zeros in front, (batch, time), so that the next token follows every prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    longest = int(lengths.max())
    mask = torch.arange(longest) >= longest - lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.tensor([token for prompt in prompts for token in prompt])
    return ids, mask.long()
