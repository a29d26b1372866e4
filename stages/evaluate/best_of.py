"""Measure best-of-n of one policy, next to the policies that were trained.

Best-of-n samples n responses to a prompt and keeps the one that a judge scores highest (Stiennon et
al. 2020, Nakano et al. 2021). It needs no training, so a trained policy should beat it at an equal
KL to be worth its training.

Responses are not drawn n at a time. The expected value over all subsets of n among N >= n samples
of a prompt is one sum (rlhf.measuring.statistics.best_of_n). It is unbiased, and it has less
variance than the best of one such subset.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.measuring.statistics import best_of_n, best_of_n_kl, bootstrap_interval, share_interval
from stages.evaluate.measures import Scores, gain, win_rate_key
from stages.evaluate.parts import PartsByPrompt, describe_parts


@dataclass(frozen=True)
class Pool:
    """Holds N responses of one policy to each prompt, and what is known of them."""

    scores: Mapping[str, Scores]
    """Maps judge to the scores of each prompt's responses."""
    tokens: Scores
    """Tokens of each response, its end token included."""
    parts: PartsByPrompt | None
    """Parts of gold of each response. None means that there are none."""


def best_of_figures(
    pool: Pool,
    n: int,
    chooser: str,
    baseline: str,
    answers: Mapping[str, Scores],
    *,
    right: tuple[str, Scores] | None,
    kinds: Sequence[str] | None,
    seed: int,
) -> dict[str, Any]:
    """Return the figures of best-of-n under the keys that a policy has in results.json.

    `kl` is ln n - (n-1)/n, in nats a response. It is exact if no two responses of a prompt have the
    same score, and otherwise an upper bound (Beirami et al. 2024), so it has no error.

    Args:
        chooser: Name of the judge that chooses among the n responses.
        baseline: Name of the policy that gave the pool, and that win rates compare with.
        answers: maps judge to the scores of the baseline's own answers, which are not in the pool.
        right: The part of gold that says whether a response is right, and its values for the
            baseline's own answers. None means that gold has no such part.
        kinds: Kind of each prompt. None means that there are none.

    Raises:
        ValueError: n is above the number of responses of a prompt.
    """
    chosen = _Chosen(pool.scores[chooser], n)
    figures: dict[str, Any] = {"response_tokens": _mean(chosen.values(pool.tokens))}
    if pool.parts is not None:
        name = None if right is None else right[0]
        expected = [[_expected_parts(*one, n)] for one in chosen.prompts(pool.parts)]
        figures |= describe_parts(expected, name, kinds, seed)
        if right is not None:
            of_pool = [[row[right[0]] for row in rows if right[0] in row] for rows in expected]
            figures |= gain("right", of_pool, right[1], baseline, seed)
    figures["kl"] = best_of_n_kl(n)
    for number, (judge, scores) in enumerate(pool.scores.items()):
        values = chosen.values(scores)
        figures[f"{judge}_score"] = _mean(values)
        figures[f"{judge}_score_interval"] = bootstrap_interval(values, seed)
        figures |= gain(judge, values, answers[judge], baseline, seed)
        wins = chosen.values(_outcomes(scores, answers[judge]))
        key = win_rate_key(baseline, None if number == 0 else judge)
        figures[key], figures[f"{key}_interval"] = _mean(wins), share_interval(wins, seed)
    return figures


def best_of_curve(pool: Pool, n: int, chooser: str) -> dict[str, dict[str, float]]:
    """Return KL and mean score by each judge of best-of-k, by k = 1, 2, 4, ... up to n.

    It shows over-optimisation where the chooser's score keeps rising and another judge's falls
    (Gao et al. 2022).
    """
    curve = {}
    for number in _doubled_up_to(n):
        chosen = _Chosen(pool.scores[chooser], number)
        scores = {f"{judge}_score": _mean(chosen.values(of)) for judge, of in pool.scores.items()}
        curve[str(number)] = {"kl": best_of_n_kl(number), **scores}
    return curve


@dataclass(frozen=True)
class _Chosen:
    """Chooses among each prompt's responses, in expectation over all subsets of n."""

    by: Scores
    n: int

    def values(self, of: Scores) -> Scores:
        """Return the expected value of the chosen response, one for each prompt."""
        return [[best_of_n(by, values, self.n)] for by, values in self.prompts(of)]

    def prompts(self, of: Sequence[Any]) -> Iterator[tuple[list[float], Any]]:
        return zip(self.by, of, strict=True)


def _expected_parts(
    by: Sequence[float], rows: Sequence[Mapping[str, float]], n: int
) -> dict[str, float]:
    """Return the expected value of each part that all responses of a prompt have."""
    names = [name for name in rows[0] if all(name in row for row in rows)]
    return {name: best_of_n(by, [row[name] for row in rows], n) for name in names}


def _outcomes(scores: Scores, against: Scores) -> Scores:
    """Return the mean outcome of each response of the pool against the baseline's answers: 1 for a
    higher score, 0.5 for an equal one."""
    return [
        [_mean([[float(one > other) + 0.5 * float(one == other) for other in of]]) for one in row]
        for row, of in zip(scores, against, strict=True)
    ]


def _doubled_up_to(n: int) -> list[int]:
    """Return 1, 2, 4, ... and n itself."""
    powers = [2**i for i in range(n.bit_length()) if 2**i < n]
    return [*powers, n]


def _mean(by_prompt: Scores) -> float:
    values = [value for of_prompt in by_prompt for value in of_prompt]
    return sum(values) / len(values)
