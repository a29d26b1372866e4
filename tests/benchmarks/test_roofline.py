import pytest

from benchmarks.roofline import Phase, describe


def test_the_limit_is_the_slower_of_computing_and_moving() -> None:
    phase = Phase("train", seconds=10.0, flops=6e9, num_bytes=4e9)
    assert phase.limit(rate=2e9, bandwidth=2e9) == 3.0
    assert phase.limit(rate=6e9, bandwidth=1e9) == 4.0


def test_the_largest_gap_is_the_one_with_most_seconds_over_its_limit() -> None:
    # step: 2 s over its limit of 0, train: 3 s over its limit of 7.
    phases = [Phase("step", 2.0, 0.0, 0.0), Phase("train", 10.0, 7e9, 0.0)]
    text, rows = describe("ppo", phases, rate=1e9, bandwidth=1e9)
    assert "largest gap is in train: 3.00 s" in text
    assert "| train | 10.00 | 1 | 7.00 | 70% |" in text
    assert [row["share_of_limit"] for row in rows] == pytest.approx([0.0, 0.7])
