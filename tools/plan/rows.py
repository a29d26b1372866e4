"""Makes the fullest rows that a model gets."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rlhf.inputs.packing import Layout, PackedRow, Packer, PromptTree, text_tree
from rlhf.models.settings import ModelSettings


def tree_of(prompt: int, response: int) -> PromptTree:
    """Make a tree of a prompt and a response of so many tokens."""
    return PromptTree((0,) * prompt, ((0,) * response,))


@dataclass(frozen=True)
class Rows:
    """The fullest rows that a model gets."""

    settings: ModelSettings
    budget: int
    """The most tokens in a row."""
    device: str

    def of_episodes(self, prompt: int, response: int, num_trees: int) -> PackedRow:
        """Make a row of trees of the largest size, and a smaller one that fills the rest."""
        num_whole = max(1, min(self.budget // (prompt + response), num_trees))
        trees = [tree_of(prompt, response)] * num_whole
        left = self.budget - num_whole * (prompt + response)
        if left > 1 and num_whole < num_trees:
            trees.append(tree_of(max(1, left - response), min(response, left - 1)))
        return self._lay(trees)

    def of_texts(self, block: int, num_blocks: int) -> PackedRow:
        """Make a row of blocks of text."""
        return self._lay([text_tree([0] * block)] * max(1, min(self.budget // block, num_blocks)))

    def _lay(self, trees: Sequence[PromptTree]) -> PackedRow:
        is_flash = self.settings.attention == "flash_attention_2"
        layout = Layout.SEQUENCES if is_flash else Layout.MASK
        row, *_ = Packer(self.budget, layout).rows(trees)
        # With segments, as without a mask, attention saves only queries, keys and values. A block
        # mask holds a few numbers for each 128 tokens.
        has_segments = self.device == "cpu" and self.settings.attention == "sdpa"
        has_blocks = self.settings.attention == "flex_attention"
        return replace(row, plain=row.plain or is_flash or has_segments or has_blocks)
