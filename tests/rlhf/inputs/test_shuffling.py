"""Batches in random order, and their state."""

from itertools import islice

from rlhf.inputs.shuffling import ShuffledBatches
from rlhf.inputs.streams import torch_stream


def test_every_item_comes_once_a_pass_in_a_new_order() -> None:
    batches = list(islice(ShuffledBatches("abcdefg", 3, torch_stream(0, "letters")), 7))
    seen = "".join(item for batch in batches for item in batch)
    passes = [seen[:7], seen[7:14], seen[14:]]
    assert all(len(batch) == 3 for batch in batches)
    assert all(sorted(one) == list("abcdefg") for one in passes)
    assert len(set(passes)) == 3
    assert next(ShuffledBatches("abcdefg", 7, torch_stream(1, "letters"))) != list(passes[0])


def test_the_state_gives_the_rest_from_the_middle_of_a_pass() -> None:
    batches = ShuffledBatches(range(7), 3, torch_stream(0, "numbers"))
    for _ in range(4):
        next(batches)
    state = batches.state_dict()
    rest = list(islice(batches, 6))
    again = ShuffledBatches(range(7), 3, torch_stream(5, "numbers"))
    again.load_state_dict(state)
    assert list(islice(again, 6)) == rest


def test_batches_of_nothing_are_empty() -> None:
    assert list(islice(ShuffledBatches([], 0, torch_stream(0, "none")), 3)) == [[], [], []]
