"""Counts model FLOPs: the additions and multiplications that a pass needs on any machine.

    forward = 2 N tokens + 2 U logits + 4 A pairs
    forward and backward = 3 forward - 2 F tokens - 2 G logits

    N      weights in matrices of the body, without embeddings (Kaplan et al. 2020, 2.1)
    U      vocab * model of the unembedding, where logits are computed
    A      heads * head size, summed over the layers
    pairs  the (query, key) pairs that attention needs
    F, G   the part of N and of U that is frozen below an adapter

For `pairs` see Chowdhery et al. 2022, appendix B: 12 A T per token for training, or 3 * 4 A T. They
charge every token for T keys; here a token is charged for the keys that it may see. A gradient goes
through frozen weights, but they get none themselves, hence the terms with F and G.

Norms, biases, activation functions, softmax and the optimizer are left out. So are passes that
gradient checkpointing repeats. All experts of a mixture are counted, which is too many.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rlhf.inputs.packing import PromptTree
from rlhf.models.architectures import layer_configs
from rlhf.training.streaming import whole_shape


@dataclass(frozen=True)
class ModelSize:
    """The sizes of a decoder that decide its FLOPs."""

    weights: int
    """N: weights in matrices of the body, without embeddings of tokens and positions."""
    unembedding: int
    """U: vocab * model; 0 for a model with a scalar head."""
    attention: int
    """A: heads * head size, summed over the layers."""
    frozen_weights: int = 0
    """F: the frozen part of `weights`."""
    frozen_unembedding: int = 0
    """G: the frozen part of `unembedding`."""


def size_of(model: Any) -> ModelSize:
    """Return the size of a transformers model on any device, even the meta device."""
    config = model.config.get_text_config()
    unembedding = model.get_output_embeddings()
    outside = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    outside += [] if unembedding is None else [unembedding]
    skipped = {id(parameter) for module in outside for parameter in module.parameters()}
    matrices = [p for p in model.parameters() if len(whole_shape(p)) > 1 and id(p) not in skipped]
    heads = [] if unembedding is None else [unembedding.weight]
    return ModelSize(
        weights=sum(map(_numel, matrices)),
        unembedding=sum(map(_numel, heads)),
        attention=_attention_of(config),
        frozen_weights=sum(_numel(p) for p in matrices if not p.requires_grad),
        frozen_unembedding=sum(_numel(p) for p in heads if not p.requires_grad),
    )


def _attention_of(config: Any) -> int:
    """Return A from a config; 0 if the config does not say, as for a model without attention."""
    return sum(map(_attention_of_layer, layer_configs(config)))


def _attention_of_layer(config: Any) -> int:
    head_size = getattr(config, "head_dim", None)
    if isinstance(head_size, int):
        return getattr(config, "num_attention_heads", 0) * head_size
    return getattr(config, "hidden_size", 0)


@dataclass(frozen=True)
class Work:
    """Counts what a pass over some trees computes."""

    tokens: int = 0
    """Tokens that go through the body."""
    logits: int = 0
    """Positions with logits."""
    pairs: int = 0
    """(query, key) pairs of attention; a token sees its own path from the root."""

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.tokens + other.tokens, self.logits + other.logits, self.pairs + other.pairs
        )

    def __mul__(self, factor: int) -> "Work":
        return Work(self.tokens * factor, self.logits * factor, self.pairs * factor)


def work_of(trees: Iterable[PromptTree]) -> Work:
    """Return the work of one pass over each tree, counting its prompt once."""
    return sum((_work_of_tree(tree) for tree in trees), Work())


def text_work(num_tokens: int) -> Work:
    """Return the work of one pass over a block of text."""
    return Work(num_tokens, num_tokens - 1, _triangle(num_tokens))


def forward_flops(size: ModelSize, work: Work) -> float:
    """Return the FLOPs of one forward pass."""
    return (
        2.0 * size.weights * work.tokens
        + 2.0 * size.unembedding * work.logits
        + 4.0 * size.attention * work.pairs
    )


def training_flops(size: ModelSize, work: Work) -> float:
    """Return the FLOPs of a forward pass and its backward pass."""
    frozen = 2.0 * size.frozen_weights * work.tokens + 2.0 * size.frozen_unembedding * work.logits
    return 3 * forward_flops(size, work) - frozen


def update_flops(
    policy: ModelSize,
    value_model: ModelSize,
    reward_models: Sequence[ModelSize],
    episodes: Work,
    texts: Work,
    num_epochs: float,
    *,
    is_taught: bool = False,
) -> dict[str, float]:
    """Return the FLOPs of a PPO update by phase; the names are those in seconds/NAME.

    Args:
        episodes: Work of one pass over the update's prompts and responses.
        texts: Work of one pass over all its text blocks.
        num_epochs: Passes over the episodes; a fraction if the update ended early.
        is_taught: Whether the reference reads the text too (ptx.targets).
    """
    policy_pass = forward_flops(policy, episodes)
    value_pass = forward_flops(value_model, episodes)
    training = training_flops(policy, episodes) + training_flops(value_model, episodes)
    teaching = forward_flops(policy, texts) if is_taught else 0.0
    return {
        "rollout": policy_pass,  # one token at a time with cached keys and values: the same FLOPs
        "score": sum(forward_flops(size, episodes) for size in reward_models),
        "logprobs": policy_pass,
        "reference": policy_pass,
        "value": value_pass,
        "ptx": training_flops(policy, texts) + teaching,
        "train": num_epochs * training,
    }


def _work_of_tree(tree: PromptTree) -> Work:
    prompt = len(tree.prompt)
    lengths = [len(response) for response in tree.responses]
    pairs = sum(length * prompt + _triangle(length) for length in lengths)
    return Work(prompt + sum(lengths), sum(lengths), _triangle(prompt) + pairs)


def _numel(parameter: Tensor) -> int:
    return math.prod(whole_shape(parameter))


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
