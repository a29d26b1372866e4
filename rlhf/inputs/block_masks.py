"""Describes to FlexAttention which tokens of a packed row belong together.

A *block mask* is a rule for pairs of tokens, and a list of the blocks of pairs that the rule allows
in whole or in part. FlexAttention computes only these. So a row of n trees costs about 1/n of all
pairs, and nothing holds an entry for every pair of tokens. The lists are found on the host from
counts, where the row is laid: finding them on a device would make the host wait for it.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK_TOKENS = 128
"""Tokens on each side of a block: what FlexAttention's kernels are made for."""
SOME, ALL = 1, 2
"""How many pairs of a block are allowed; 0 means none."""


class _RowMask(BlockMask):
    """A block mask with `ndim`, which GPT-2 reads: it leaves masks of four axes as they are."""

    ndim = 4


def block_kinds(tree: Tensor, branch: Tensor) -> Tensor:
    """Return for every block of a row whether none, SOME or ALL of its pairs are allowed.

    Args:
        tree: (length,) number of each token's tree, as in PackedRow.
        branch: (length,) 0 in a prompt, otherwise 1 + the number of the response within its tree.

    Returns:
        (blocks, blocks) int8; the first axis attends to the second.
    """
    block = torch.arange(len(tree)) // BLOCK_TOKENS
    starts = (tree.diff(prepend=tree[:1]) != 0) | (branch.diff(prepend=branch[:1]) != 0)
    in_prompt = branch == 0
    segments = _counts(block, starts.cumsum(0))
    prompts, responses = (_counts(block, tree, which) for which in (in_prompt, ~in_prompt))
    # Pairs within a prompt or a response, and of a response with its prompt, be they late or early.
    pairs = segments @ segments.T + responses @ prompts.T
    kinds = torch.where(pairs == BLOCK_TOKENS**2, ALL, SOME) * (pairs > 0)
    # On the diagonal every token sees itself, and only the last one sees the whole block.
    return (kinds.tril(-1) + SOME * torch.eye(len(kinds))).to(torch.int8)


def make_block_mask(tree: Tensor, branch: Tensor, kinds: Tensor) -> BlockMask:
    """Return a row's block mask (1, 1, length, length), on the device of the arguments.

    Args:
        tree, branch: As in `block_kinds`.
        kinds: (blocks, blocks) what `block_kinds` returned.
    """

    def allows(_: Tensor, __: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_seen = (branch[key] == 0) | (branch[key] == branch[query])
        return (tree[query] == tree[key]) & is_seen & (query >= key)

    length = len(tree)
    return _RowMask.from_kv_blocks(
        *_block_lists(kinds == SOME),
        *_block_lists(kinds == ALL),
        BLOCK_SIZE=BLOCK_TOKENS,
        mask_mod=allows,
        seq_lengths=(length, length),
    )


def _counts(block: Tensor, group: Tensor, which: Tensor | None = None) -> Tensor:
    """Return how many tokens of each group a block holds (blocks, groups), as exact floats.

    `which` (length,) says which tokens count; None means all.
    """
    num_blocks, num_groups = int(block[-1]) + 1, int(group[-1]) + 1  # both only grow
    places = block * num_groups + group
    if which is not None:
        places = places[which]
    counts = torch.bincount(places, minlength=num_blocks * num_groups)
    return counts.view(num_blocks, num_groups).float()


def _block_lists(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row has chosen (1, 1, blocks), and their numbers.

    The numbers come first in each row of (1, 1, blocks, blocks).
    """
    numbers = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[None, None], numbers.to(torch.int32)[None, None]
