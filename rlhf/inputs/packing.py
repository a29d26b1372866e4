"""Packs prompt trees into rows without padding, and unpacks the results into a batch.

A *prompt tree* is a prompt and the responses that continue it. It may be a ranking (1 prompt, K
responses), a rollout (1 prompt, n samples), a demonstration (1, 1), or a text document (its first
token as the prompt, the rest as the response). A row holds the prompt once, then each response.
The positions of every response continue from the end of the prompt. A token attends to another iff
both belong to one tree, the other is not later, and the other is in the prompt or in its own
response:

    tokens     p0 p1 p2 | a0 a1 | b0 b1 b2        one tree: prompt p, responses a and b
    positions   0  1  2 |  3  4 |  3  4  5
    predictor           | p2 a0 | p2 b0 b1        whose logits predict this token

So K responses cost one pass over the prompt instead of K, and different lengths cost no padding.
A packed pass equals the separate passes up to floating-point noise
(tests/rlhf/inputs/test_packing.py).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from rlhf.inputs.block_masks import block_kinds, make_block_mask

ModelInput = Tensor | BlockMask | None


@dataclass(frozen=True)
class PromptTree:
    """A prompt and the responses that continue it, as token ids.

    Example:
        PromptTree(prompt=(5, 6), responses=((7, 2), (8, 9, 2)))
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert self.prompt, "a prompt tree needs at least one prompt token"
        assert self.responses, "a prompt tree needs at least one response"

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(len(response) for response in self.responses)

    @property
    def depth(self) -> int:
        """Number of tokens from the root to the end of the longest response."""
        return len(self.prompt) + max(len(response) for response in self.responses)


def text_tree(ids: Sequence[int]) -> PromptTree:
    """Make a tree of a document: its first token is given, the others are predicted."""
    return PromptTree(prompt=(ids[0],), responses=(tuple(ids[1:]),))


class Layout(IntEnum):
    """Ways to lay trees into rows, from the most computation to the least."""

    ALONE = 0
    """Every response has a row of its own, after its own prompt. Every model can take that."""
    SEQUENCES = 1
    """Responses share rows, each after its own prompt. Positions restart at 0, which tells flash
    attention where a sequence begins."""
    MASK = 2
    """Trees share rows, and responses share their prompt. A mask with an entry for every pair of
    tokens separates them."""
    BLOCKS = 3
    """As MASK, but with a block mask, which leaves out blocks (rlhf.inputs.block_masks)."""
    SEGMENTS = 4
    """As MASK, but with segments instead on a CPU (rlhf.models.packed_attention)."""


@dataclass(frozen=True)
class PackedRow:
    """One row of packed trees: a model's inputs, and where its results belong.

    Shapes: `length` tokens in the row, `responses` responses, `tokens` tokens of these responses.
    """

    input_ids: Tensor
    """(1, length)"""
    position_ids: Tensor
    """(1, length), where each response continues from the end of its prompt"""
    tree: Tensor
    """(length,) number of the token's tree within this row"""
    branch: Tensor
    """(length,) 0 in a prompt, otherwise 1 + the number of the response within its tree"""
    predictors: Tensor
    """(tokens,) position whose hidden state predicts each response token"""
    targets: Tensor
    """(tokens,) the response tokens themselves, one response after another"""
    response_index: Tensor
    """(responses,) number of each response among all responses of the packed trees"""
    tree_index: Tensor
    """(responses,) number of the tree of each response among all packed trees"""
    response_mask: Tensor
    """(responses, time) True where a response has a token"""
    token_places: Tensor
    """(tokens,) index of each response token in a flattened (responses, time). To index with the
    mask instead, the host would wait until the device has counted them."""
    ends: Tensor | None
    """(responses,) position in the row of each response's last token. None if a response has no
    token, or if the row leaves last tokens out (predicting_rows)."""
    plain: bool
    """True if the row holds one tree with one response, so that it needs no mask of its own"""
    layout: Layout = Layout.MASK
    """how the model knows which tokens belong together"""
    mask_dtype: torch.dtype | None = None
    """Type of a mask that is added to the attention scores. None means a boolean mask."""
    segments: Tensor | None = None
    """(1, 1, 4, segments), which packed_attention.py takes as a mask on a CPU. None means a
    mask."""
    blocks: Tensor | None = None
    """(blocks, blocks) which blocks of pairs a block mask allows. None means no block mask."""

    @cached_property
    def attention_mask(self) -> Tensor | None:
        """(1, 1, length, length), the third axis attends to the fourth. None means plain causal,
        or that positions separate the row's sequences.

        The mask is boolean, True where a token may attend. With `mask_dtype` it is 0 there and the
        type's lowest number elsewhere. On a CPU it may be the segments instead.
        """
        if self.plain or self.layout == Layout.SEQUENCES:
            return None
        if self.segments is not None and self.device.type == "cpu":
            return self.segments
        # Every prompt has its own number, and so has every response.
        prompt = self.tree * (self.branch.max() + 1)  # (length,)
        segment = prompt + self.branch
        allowed = (segment[:, None] == segment) | (prompt[:, None] == segment)
        allowed = allowed.tril()[None, None]
        if self.mask_dtype is None:
            return allowed
        lowest = torch.finfo(self.mask_dtype).min
        return torch.zeros_like(allowed, dtype=self.mask_dtype).masked_fill(~allowed, lowest)

    @cached_property
    def block_mask(self) -> BlockMask:
        """(1, 1, length, length), what a boolean mask says, for FlexAttention. It is made once and
        shared by all layers and models that read the row."""
        assert self.blocks is not None, "only rows laid out by BLOCKS have a block mask"
        return make_block_mask(self.tree, self.branch, self.blocks)

    @property
    def last_tokens(self) -> Tensor:
        """(responses,) position in the row of each response's last token, where a score is read.

        Raises:
            ValueError: A response has no tokens, so there is no place to read its score.
        """
        if self.ends is None:
            raise ValueError("a response without tokens has no score; end it with its end token")
        return self.ends

    @property
    def device(self) -> torch.device:
        return self.input_ids.device

    @property
    def model_inputs(self) -> dict[str, ModelInput]:
        """The model's inputs. A plain row leaves positions and mask to the model.

        Some architectures have neither, and others count positions in their own way."""
        if self.plain:
            return {"input_ids": self.input_ids}
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": self.attention_mask if self.blocks is None else self.block_mask,
        }

    def unpack(self, flat: Tensor) -> Tensor:
        """Turn (tokens,) into (responses, time), 0 without a token; gradients flow through."""
        shape = self.response_mask.shape
        return flat.new_zeros(shape.numel()).scatter(0, self.token_places, flat).view(shape)

    def pack(self, batch: Tensor) -> Tensor:
        """Turn (responses, time) into (tokens,): the inverse of `unpack`."""
        return batch.flatten()[self.token_places]

    def select(self, batch: Tensor) -> Tensor:
        """Return this row's part of (all responses, time), cut to its longest response."""
        return batch[self.response_index][:, : self.response_mask.shape[1]]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "PackedRow":
        """Copy all tensors to a device, like Tensor.to."""
        tensors = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in self.__dict__.items()
            if isinstance(value, Tensor) and name in self.__dataclass_fields__
        }
        return replace(self, **tensors)  # type: ignore[arg-type]  # only its Tensor fields


@dataclass(frozen=True)
class Packer:
    """Decides how trees become rows for one model; `packer_for` finds what a model can take."""

    micro_batch_tokens: int
    """Maximum number of tokens in a row, and so in a pass. A tree is never cut: if it exceeds the
    budget, it gets a row of its own."""
    layout: Layout = Layout.MASK
    """What shares a row, and what separates it."""
    max_depth: int | None = None
    """Length of a sliding attention window. Responses of a deeper tree get rows of their own. None
    means no window."""
    mask_dtype: torch.dtype | None = None
    """Type of the mask that eager attention adds to its scores. None means boolean masks (sdpa)."""

    @property
    def shares_prompts(self) -> bool:
        """Whether the responses of a tree share one pass over their prompt."""
        return self.layout >= Layout.MASK

    def rows(self, trees: Sequence[PromptTree]) -> list[PackedRow]:
        """Pack trees into rows by first fit, longest trees first."""
        first_response = _starts(len(tree.responses) for tree in trees)
        numbered: list[_NumberedTree] = [
            (number, tree.prompt, list(enumerate(tree.responses, start=first_response[number])))
            for number, tree in enumerate(trees)
        ]
        if self.layout == Layout.SEQUENCES:
            return self._share_rows(_split_responses(numbered))
        shared = [item for item, tree in zip(numbered, trees, strict=True) if self._may_share(tree)]
        alone = [
            item for item, tree in zip(numbered, trees, strict=True) if not self._may_share(tree)
        ]
        return self._share_rows(shared) + [_make_row([item]) for item in _split_responses(alone)]

    def _share_rows(self, numbered: "Sequence[_NumberedTree]") -> list[PackedRow]:
        sizes = [
            len(prompt) + sum(len(response) for _, response in responses)
            for _, prompt, responses in numbered
        ]
        rows = [
            _make_row([numbered[item] for item in items])
            for items in _first_fit(sizes, self.micro_batch_tokens)
        ]
        has_segments, has_blocks = self.layout == Layout.SEGMENTS, self.layout == Layout.BLOCKS
        return [
            replace(
                row,
                layout=self.layout,
                mask_dtype=self.mask_dtype,
                segments=_segments(row) if has_segments else None,
                blocks=block_kinds(row.tree, row.branch) if has_blocks else None,
            )
            for row in rows
        ]

    def _may_share(self, tree: PromptTree) -> bool:
        return self.shares_prompts and (self.max_depth is None or tree.depth <= self.max_depth)


def idle_row() -> PackedRow:
    """Make a row of one token without a response, for a process that must make one more pass.

    All results of a pass over it are empty. So its loss is 0, and so is its gradient.
    """
    none = torch.zeros(0, dtype=torch.long)
    one = torch.zeros(1, dtype=torch.long)
    return PackedRow(
        input_ids=one[None],
        position_ids=one[None],
        tree=one,
        branch=one,
        predictors=none,
        targets=none,
        response_index=none,
        tree_index=none,
        response_mask=torch.zeros(0, 0, dtype=torch.bool),
        token_places=none,
        ends=none,
        plain=True,
    )


def assemble(rows: Sequence[PackedRow], results: Sequence[Tensor]) -> Tensor:
    """Put the rows' results, each (responses, ...), into the order of the packed trees.

    Results of (responses, time) are padded with zeros to the longest.
    """
    num_responses = sum(len(row.response_index) for row in rows)
    widths = [max(sizes) for sizes in zip(*(one.shape[1:] for one in results), strict=True)]
    batch = results[0].new_zeros([num_responses, *widths])
    for row, result in zip(rows, results, strict=True):
        if result.ndim == 1:
            batch[row.response_index] = result
        else:
            batch[row.response_index, : result.shape[1]] = result
    return batch


def predicting_rows(packer: Packer, trees: Sequence[PromptTree]) -> list[PackedRow]:
    """Pack trees into rows in which each response's last token is a target, but not an input.

    Nothing follows that token, so no result depends on its hidden state. A response of one token
    then costs no token at all: the end of its prompt predicts it. Such rows serve to compute
    log-probabilities without gradient; they have no place to read a score.
    """
    shorter = [replace(tree, responses=tuple(one[:-1] for one in tree.responses)) for tree in trees]
    responses = [response for tree in trees for response in tree.responses]
    return [_predict_whole(row, responses) for row in packer.rows(shorter)]


def _predict_whole(row: PackedRow, responses: Sequence[tuple[int, ...]]) -> PackedRow:
    """Let a row of responses without their last tokens predict the whole responses."""
    prompt_ends: dict[int, int] = {}
    places: dict[tuple[int, int], list[int]] = {}
    for place, segment in enumerate(zip(row.tree.tolist(), row.branch.tolist(), strict=True)):
        tree, branch = segment
        if branch == 0:
            prompt_ends[tree] = place
        else:
            places.setdefault(segment, []).append(place)
    # In that layout a row counts every sequence as a tree of its own.
    is_tree = row.layout == Layout.SEQUENCES
    numbers = range(len(row.tree_index)) if is_tree else row.tree_index.tolist()
    branches = _branches(numbers)
    predictors = [
        place
        for tree, branch in branches
        for place in (prompt_ends[tree], *places.get((tree, branch), ()))
    ]
    whole = [responses[number] for number in row.response_index.tolist()]
    targets, mask = response_batch(whole)
    return replace(
        row,
        predictors=torch.tensor(predictors),
        targets=targets[mask],
        response_mask=mask,
        token_places=_true_places(mask),
        ends=None,
    )


def _branches(tree_index: Sequence[int]) -> list[tuple[int, int]]:
    """Return (tree, branch) of each response as a row counts them, from the trees' numbers."""
    numbers: dict[int, int] = {}
    counts: dict[int, int] = {}
    found = []
    for tree in tree_index:
        counts[tree] = counts.get(tree, 0) + 1
        found.append((numbers.setdefault(tree, len(numbers)), counts[tree]))
    return found


def _true_places(response_mask: Tensor) -> Tensor:
    """Return the places (tokens,) in a flattened mask (responses, time) where it is True."""
    return response_mask.flatten().nonzero().squeeze(1)


def response_batch(responses: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return responses as ids (responses, time), zeros after the end, and their response_mask."""
    lengths = torch.tensor([len(response) for response in responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    tokens = [token for response in responses for token in response]
    ids[mask] = torch.tensor(tokens, dtype=torch.long)
    return ids, mask


_NumberedTree = tuple[int, tuple[int, ...], list[tuple[int, tuple[int, ...]]]]
"""Number of a tree, its prompt, and its responses with their numbers."""


def _split_responses(numbered: Sequence[_NumberedTree]) -> list[_NumberedTree]:
    """Give every response a prompt of its own."""
    return [
        (number, prompt, [response])
        for number, prompt, responses in numbered
        for response in responses
    ]


def _make_row(numbered: list[_NumberedTree]) -> PackedRow:
    ids: list[int] = []
    positions: list[int] = []
    tree: list[int] = []
    branch: list[int] = []
    predictors: list[int] = []
    lengths: list[int] = []
    ends: list[int] = []
    response_index: list[int] = []
    tree_index: list[int] = []
    for place, (number, prompt, responses) in enumerate(numbered):
        prompt_end = len(ids) + len(prompt) - 1
        ids += prompt
        positions += range(len(prompt))
        branch += [0] * len(prompt)
        for i, (response_number, response) in enumerate(responses, start=1):
            start = len(ids)
            predictors += [prompt_end, *range(start, start + len(response) - 1)][: len(response)]
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
            branch += [i] * len(response)
            lengths.append(len(response))
            ends.append(len(ids) - 1)
            response_index.append(response_number)
            tree_index.append(number)
        tree += [place] * (len(ids) - len(tree))
    branches = torch.tensor(branch)
    input_ids = torch.tensor([ids])
    response_mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return PackedRow(
        input_ids=input_ids,
        position_ids=torch.tensor([positions]),
        tree=torch.tensor(tree),
        branch=branches,
        predictors=torch.tensor(predictors, dtype=torch.long),
        targets=input_ids[0, branches > 0],
        response_index=torch.tensor(response_index),
        tree_index=torch.tensor(tree_index),
        response_mask=response_mask,
        token_places=_true_places(response_mask),
        ends=torch.tensor(ends) if all(lengths) else None,
        plain=len(response_index) == 1,
    )


def _segments(row: PackedRow) -> Tensor:
    """Return (1, 1, 4, segments) for packed_attention.py; an only response joins its prompt."""
    columns: list[tuple[int, int, int, int]] = []
    lengths = row.tree.bincount().tolist()
    for start, length, branch in zip(
        _starts(lengths), lengths, row.branch.split(lengths), strict=True
    ):
        prompt, *responses = branch.bincount().tolist()
        if len(responses) == 1:
            columns.append((start, start + length, start, start))
            continue
        prompt_end = start + prompt
        columns.append((start, prompt_end, start, start))
        for place, size in zip(_starts(responses), responses, strict=True):
            if size:
                first = prompt_end + place
                columns.append((first, first + size, start, prompt_end))
    return torch.tensor(columns).T[None, None]


def _first_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items into bins within capacity by first fit, largest first; return item numbers."""
    bins: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda item: (-sizes[item], item)):
        place = next((i for i, free in enumerate(room) if free >= sizes[item]), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(item)
        room[place] -= sizes[item]
    return bins


def _starts(lengths: Iterable[int]) -> list[int]:
    starts, total = [], 0
    for length in lengths:
        starts.append(total)
        total += length
    return starts
