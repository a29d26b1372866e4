"""Tests functions of scores with numbers by hand."""

import pytest
import torch

from rlhf.rewards.scores import (
    Scored,
    adjust_missing_end,
    clip_scores,
    combine_members,
    penalize_length,
    spread,
)


def test_missing_ends_and_clip() -> None:
    scores = torch.tensor([3.0, 3.0, -5.0])
    finished = torch.tensor([True, False, False])
    assert adjust_missing_end(scores, finished, "replace", -1.0).tolist() == [3.0, -1.0, -1.0]
    assert adjust_missing_end(scores, finished, "subtract", 1.0).tolist() == [3.0, 2.0, -6.0]
    assert adjust_missing_end(scores, finished, "none", 9.0).tolist() == [3.0, 3.0, -5.0]
    assert clip_scores(scores, 4.0).tolist() == [3.0, 3.0, -4.0]
    assert clip_scores(scores, None).tolist() == [3.0, 3.0, -5.0]
    assert scores.tolist() == [3.0, 3.0, -5.0]


def test_length_is_charged_beyond_its_allowance_only() -> None:
    scores, lengths = torch.tensor([1.0, 1.0, 1.0, -2.0]), torch.tensor([3, 4, 6, 5])
    assert penalize_length(scores, lengths, 0.5, 4).tolist() == [1.0, 1.0, 0.0, -2.5]
    assert penalize_length(scores, lengths, 0.25, 0).tolist() == [0.25, 0.0, -0.5, -3.25]
    assert penalize_length(scores, lengths, 0.0, 0).tolist() == scores.tolist()


def test_members_are_combined_as_coste_et_al_do() -> None:
    scores = torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0], [8.0, 0.0, -1.0]])  # (members, batch)
    assert combine_members(scores, "mean", 9.0).tolist() == [4.0, 0.0, 1.0]
    assert combine_members(scores, "worst", 9.0).tolist() == [1.0, 0.0, -1.0]
    # variances over the members: (9 + 1 + 16) / 3, 0, (1 + 1 + 4) / 3
    assert spread(scores).tolist() == pytest.approx([26 / 3, 0.0, 2.0])
    found = combine_members(scores, "mean_minus_spread", 0.5)
    assert found.tolist() == pytest.approx([4 - 13 / 3, 0.0, 0.0])


def test_what_no_token_has_stands_at_the_end() -> None:
    scores = torch.tensor([2.0, -1.0])
    assert Scored(scores).at_end.tolist() == [2.0, -1.0]
    tokens = torch.tensor([[0.5, 0.0, 0.25], [1.0, 0.0, 0.0]])
    assert Scored(scores, token_rewards=tokens).at_end.tolist() == [1.25, -2.0]
