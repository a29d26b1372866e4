"""Makes the fullest rows that a model gets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from rlhf.inputs.packing import Layout, PackedRow, Packer, PromptTree, text_tree
from rlhf.models.compat import attention_of
from rlhf.models.packed_attention import PACKED_SDPA
from rlhf.models.settings import Attention


def tree_of(prompt: int, response: int, num_responses: int = 1) -> PromptTree:
    """Make a tree of a prompt and its responses, of so many tokens each."""
    return PromptTree((0,) * prompt, ((0,) * response,) * num_responses)


@dataclass(frozen=True)
class Rows:
    """The fullest rows that a model gets, laid out as `rlhf.models.layout.packer_for` would."""

    budget: int
    """The most tokens in a row."""
    layout: Layout
    """What separates the trees of a row."""
    mask_dtype: torch.dtype | None = None
    """Type of a mask that is added to the scores. None means that it is boolean."""

    @classmethod
    def of(cls, model: PreTrainedModel, attention: Attention, budget: int, device: str) -> "Rows":
        """Make the rows of a model without data.

        Args:
            attention: The attention of its settings. The model may have another in its place
                (`tools.plan.models.settings_in_passes`).
        """
        if attention == "eager":
            return cls(budget, Layout.MASK, model.dtype)
        if attention == "flash_attention_2":
            return cls(budget, Layout.SEQUENCES)
        if attention == "flex_attention":
            return cls(budget, Layout.BLOCKS)
        has_segments = device == "cpu" and attention_of(model) == PACKED_SDPA
        return cls(budget, Layout.SEGMENTS if has_segments else Layout.MASK)

    def of_episodes(
        self, prompt: int, response: int, num_trees: int, num_responses: int = 1
    ) -> PackedRow:
        """Make a row of trees of the largest size, and a smaller one that fills the rest.

        A tree above the budget has a row of its own."""
        size = prompt + num_responses * response
        num_whole = max(1, min(self.budget // size, num_trees))
        trees = [tree_of(prompt, response, num_responses)] * num_whole
        left = self.budget - num_whole * size
        if left > num_responses and num_whole < num_trees:
            shorter = min(response, (left - 1) // num_responses)
            trees.append(tree_of(left - num_responses * shorter, shorter, num_responses))
        return self._lay(trees)

    def of_texts(self, block: int, num_blocks: int) -> PackedRow:
        """Make a row of blocks of text."""
        return self._lay([text_tree([0] * block)] * max(1, min(self.budget // block, num_blocks)))

    def _lay(self, trees: Sequence[PromptTree]) -> PackedRow:
        # Flash attention and FlexAttention have no kernel here. sdpa without a mask saves the same
        # tensors: queries, keys and values. A block mask holds a few numbers for each 128 tokens.
        if self.layout == Layout.BLOCKS:
            (row,) = Packer(self.budget, Layout.MASK).rows(trees)
            return replace(row, plain=True)
        row, *_ = Packer(self.budget, self.layout, mask_dtype=self.mask_dtype).rows(trees)
        return replace(row, plain=row.plain or self.layout == Layout.SEQUENCES)
