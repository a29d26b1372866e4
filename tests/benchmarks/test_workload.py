from typing import Any

import pytest

from benchmarks.workload import Workload, every, pairs_of, ppo_prompts, rm_data, spread_lengths


def work(**changes: Any) -> Workload:
    settings: dict[str, Any] = {
        "name": "x",
        "kind": "ppo",
        "policy": "p",
        "reward_model": "r",
        "prompts": [[5]],
    }
    return Workload(**settings | changes)


def test_it_survives_the_way_to_a_worker() -> None:
    there = work(kind="rm", responses=[[[1, 2], [3]]], end_positions=[4], dtype="bfloat16")
    assert Workload.from_json(there.to_json()) == there


def test_pairs_put_the_better_response_first() -> None:
    ranking = work(kind="rm", prompts=[[7], [8]], responses=[[[1], [2], [3]], [[4], [5]]])
    assert list(pairs_of(ranking)) == [
        ([7, 1], [7, 2]),
        ([7, 1], [7, 3]),
        ([7, 2], [7, 3]),
        ([8, 4], [8, 5]),
    ]
    assert ranking.num_pairs == 4
    assert ranking.num_tokens == 2 + 5  # every prompt and every response once


def test_responses_end_at_the_first_end_position_behind_their_prompt() -> None:
    # Positions 4, 8 and 12 hold end tokens. A prompt of 3 tokens fills 0..2: its response has 3, 4.
    prompts = [[1] * length for length in (3, 4, 5, 8)]
    assert work(prompts=prompts, new_tokens=9, end_positions=[4, 8, 12]).response_lengths == [
        2, 1, 4, 1,
    ]  # fmt: skip
    assert work(prompts=prompts, new_tokens=3, end_positions=[4, 8, 12]).response_lengths == [
        2, 1, 3, 1,
    ]  # fmt: skip
    assert work(prompts=prompts, new_tokens=9).response_lengths == [9, 9, 9, 9]


@pytest.mark.parametrize("prompt_tokens", [1, 47, 48, 49, 128])
def test_end_positions_leave_no_response_longer_than_their_distance(prompt_tokens: int) -> None:
    prompts = [[1] * prompt_tokens]
    (length,) = work(prompts=prompts, new_tokens=99, end_positions=every(48, 128)).response_lengths
    assert 1 <= length <= 48


def test_data_are_the_same_every_time_and_leave_special_tokens_out() -> None:
    prompts, responses = rm_data(
        num_prompts=2, k=3, prompt_tokens=5, response_tokens=4, vocab_size=120
    )
    assert [len(prompt) for prompt in prompts] == [5, 5]
    assert [[len(one) for one in some] for some in responses] == [[4, 4, 4], [4, 4, 4]]
    assert min(min(one) for some in responses for one in some) >= 100
    again = rm_data(num_prompts=2, k=3, prompt_tokens=5, response_tokens=4, vocab_size=120)
    assert again == (prompts, responses)
    assert [len(prompt) for prompt in ppo_prompts(lengths=[2, 6], vocab_size=120)] == [2, 6]


def test_lengths_are_spread_from_the_shortest_to_the_longest() -> None:
    assert spread_lengths(5, 16, 128) == [16, 44, 72, 100, 128]
    assert spread_lengths(1, 16, 128) == [128]
