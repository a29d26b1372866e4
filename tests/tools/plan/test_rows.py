"""The fullest rows that a model gets."""

from pathlib import Path

import pytest
import torch

from rlhf.measuring.allocations import DryRun
from rlhf.models.settings import Attention, ModelSettings
from tools.plan.launch import Launch
from tools.plan.models import settings_in_passes
from tools.plan.rows import Rows


def rows_of(tiny: Path, attention: Attention, budget: int, device: str) -> Rows:
    settings = ModelSettings(path=str(tiny / "sft"), attention=attention)
    model = DryRun().policy(settings_in_passes(settings, Launch()))
    return Rows.of(model, attention, budget, device)


@pytest.mark.parametrize(
    ("device", "attention", "mask"),
    [
        ("cpu", "sdpa", (torch.int64, 4 * 2)),  # start and end of two segments and their prompts
        ("cuda", "sdpa", (torch.bool, 32 * 32)),
        ("cpu", "eager", (torch.float32, 32 * 32)),
        ("cuda", "flex_attention", None),
        ("cuda", "flash_attention_2", None),
    ],
)
def test_rows_have_a_mask_where_a_run_has_one(
    device: str, attention: Attention, mask: tuple[torch.dtype, int] | None, tiny: Path
) -> None:
    rows = rows_of(tiny, attention, 32, device)
    found = rows.of_episodes(prompt=8, response=8, num_trees=2).attention_mask
    assert (None if found is None else (found.dtype, found.numel())) == mask
    assert rows.of_episodes(prompt=8, response=8, num_trees=1).attention_mask is None


def test_responses_of_a_tree_share_their_prompt(tiny: Path) -> None:
    rows = rows_of(tiny, "sdpa", 40, "cuda")
    # One tree of 6 + 3 * 8 tokens. The 10 tokens left take another of 1 + 3 * 3.
    row = rows.of_episodes(prompt=6, response=8, num_trees=2, num_responses=3)
    assert row.input_ids.shape == (1, 40)
    assert row.response_mask.sum(1).tolist() == [8, 8, 8, 3, 3, 3]
    # A tree above the budget has a row of its own.
    row = rows.of_episodes(prompt=6, response=12, num_trees=2, num_responses=3)
    assert row.input_ids.shape == (1, 6 + 3 * 12)
