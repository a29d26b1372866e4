import time

import pytest
import torch

from rlhf.runs.stopwatch import (
    Heartbeat,
    Stopwatch,
    is_bar_hidden,
    matrix_rate,
    progress_shown,
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make a clock that stands still; tests change its only entry."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_phases_add_up_and_start_anew_when_taken(clock: list[float]) -> None:
    stopwatch = Stopwatch()
    for name, seconds in (("rollout", 3.0), ("train", 2.0), ("rollout", 1.0)):
        with stopwatch.phase(name):
            clock[0] += seconds
        clock[0] += 10.0  # between phases
    assert stopwatch.take() == {"rollout": 4.0, "train": 2.0}
    assert stopwatch.take() == {}


def test_a_phase_within_another_counts_for_the_outer(clock: list[float]) -> None:
    stopwatch = Stopwatch()
    with stopwatch.phase("evaluate"):
        clock[0] += 1.0
        with stopwatch.phase("rollout"):
            clock[0] += 2.0
    with stopwatch.phase("rollout"):
        clock[0] += 4.0
    assert stopwatch.take() == {"evaluate": 3.0, "rollout": 4.0}


def test_a_phase_that_fails_is_counted_and_ends(clock: list[float]) -> None:
    stopwatch = Stopwatch()
    with pytest.raises(ValueError), stopwatch.phase("score"):
        clock[0] += 1.0
        raise ValueError
    with stopwatch.phase("value"):
        clock[0] += 1.0
    assert stopwatch.take() == {"score": 1.0, "value": 1.0}


@pytest.mark.parametrize(
    ("milliseconds", "fastest", "num_products"),
    [
        ([1, 16, 2, 4, 8, 16], 2, 6),  # the first is a warm-up
        ([32, 64, 64, 1, 1, 1], 64, 3),  # after a tenth of a second no more
        ([256, 128, 1, 1, 1, 1], 128, 2),
    ],
)
def test_the_matrix_rate_is_that_of_the_fastest_product(
    milliseconds: list[int],
    fastest: int,
    num_products: int,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    product = torch.Tensor.__matmul__

    def slow(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        taken.append(milliseconds[len(taken)])
        clock[0] += taken[-1] / 1000
        return product(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
    rate = matrix_rate(torch.device("cpu"), torch.float32)
    assert rate == pytest.approx(2 * 512**3 / (fastest / 1000))
    assert len(taken) == num_products


def test_a_heartbeat_every_half_minute_and_none_of_short_work(clock: list[float]) -> None:
    told: list[str] = []
    beat = Heartbeat("sampled", 64, told.append)
    for seconds, done in ((29.0, 3), (2.0, 0), (20.0, 4), (10.0, 1), (29.0, 56)):
        clock[0] += seconds
        beat(done)
    assert told == ["sampled 3 of 64 after 31 s", "sampled 8 of 64 after 61 s"]


@pytest.mark.parametrize(
    ("value", "is_first", "expected"),
    [
        (None, True, False),
        (None, False, True),
        ("0", True, False),
        ("1", True, True),
        ("1", False, True),
    ],
)
def test_only_the_first_process_shows_a_bar_and_a_variable_hides_it(
    value: str | None, is_first: bool, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    if value is not None:
        monkeypatch.setenv("TQDM_DISABLE", value)
    assert is_bar_hidden(is_first) is expected


@pytest.mark.parametrize("is_first", [True, False])
def test_hidden_bars_become_lines_of_the_first_process(
    is_first: bool,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with progress_shown("evaluate: judges score", 6, is_first) as progress:
        for _ in range(3):
            clock[0] += 20.0
            progress(2)
    told = "evaluate: judges score 4 of 6 after 40 s\n"
    assert capsys.readouterr().out == (told if is_first else "")


def test_a_bar_says_nothing_else(
    clock: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with progress_shown("evaluate: sft answers", 2) as progress:
        clock[0] += 40.0
        progress(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("\revaluate: sft answers: ")
