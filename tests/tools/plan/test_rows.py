"""The fullest rows that a model gets."""

import pytest

from rlhf.models.settings import Attention, ModelSettings
from tools.plan.rows import Rows


@pytest.mark.parametrize(
    ("device", "attention", "has_mask"),
    [
        ("cpu", "sdpa", False),
        ("cuda", "sdpa", True),
        ("cuda", "flex_attention", False),
        ("cpu", "eager", True),
    ],
)
def test_rows_have_a_mask_where_a_run_has_one(
    device: str, attention: Attention, has_mask: bool
) -> None:
    rows = Rows(ModelSettings(path="unused", attention=attention), 32, device)
    row = rows.of_episodes(prompt=8, response=8, num_trees=2)
    assert (row.attention_mask is not None) == has_mask
    assert rows.of_episodes(prompt=8, response=8, num_trees=1).attention_mask is None
