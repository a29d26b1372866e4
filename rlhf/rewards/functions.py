"""Uses a user's function as a reward; an error names the row that it got wrong."""

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf.generation.answers import Answer
from rlhf.inputs.chat import Chat
from rlhf.inputs.records import Prompt, PromptLike, name_rows
from rlhf.rewards.scores import Scored

RewardFunction = Callable[[list[PromptLike], list[str], list[dict[str, Any]]], Sequence[float]]
TokenRewardFunction = Callable[
    [list[PromptLike], list[str], list[dict[str, Any]], list[list[str]]], Sequence[Sequence[float]]
]


class FunctionReward:
    """Scores by a user's function of prompts, responses and metas: one number per response."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function = function
        self.name = name

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does. The function sees prompts and texts, no ids.

        Raises:
            ValueError: The function failed, or returned a wrong number of scores, or one that is
                not finite.
        """
        columns = columns_of(answers)
        values = call_on_batch(
            self.function, self.name, columns, "a list with one number a response"
        )
        rows = (row_name(i, columns[0]) for i in range(len(values)))
        return Scored(
            torch.tensor(
                [_number(value, self.name, row) for value, row in zip(values, rows, strict=True)]
            )
        )


class TokenFunctionReward:
    """Scores by a user's function that returns one number per token; a score is the sum of them.

    The function is called with prompts, responses, metas and tokens. The tokens are the texts of
    each response's tokens (see Chat.pieces), including the end token.
    """

    def __init__(self, function: TokenRewardFunction, name: str, chat: Chat) -> None:
        self.function = function
        self.name = name
        self.chat = chat

    def score(self, answers: Sequence[Answer]) -> Scored:
        """Score as Reward.score does.

        Raises:
            ValueError: The function failed, or returned a wrong number of rows, a row that is not
                as long as its response, or a number that is not finite.
        """
        tokens = [self.chat.pieces(one.ids_ending_with(self.chat.end_id)) for one in answers]
        columns = (*columns_of(answers), tokens)
        rows = call_on_batch(
            self.function, self.name, columns, "a list of lists, one number a token"
        )
        rewards = torch.zeros(len(tokens), max(map(len, tokens)))
        for i, (row, pieces) in enumerate(zip(rows, tokens, strict=True)):
            rewards[i, : len(pieces)] = self._row(row_name(i, columns[0]), row, pieces)
        return Scored(rewards.sum(1), token_rewards=rewards)

    def _row(self, place: str, row: Any, pieces: list[str]) -> Tensor:
        """Check and return the numbers of one response (tokens,)."""
        try:
            values = list(row)
        except TypeError:
            raise ValueError(
                f"reward function {self.name} gave {row!r} ({type(row).__name__}) for {place}; "
                f"it must give a list with one number a token, {len(pieces)} of them"
            ) from None
        if len(values) != len(pieces):
            raise ValueError(
                f"reward function {self.name} gave {len(values)} numbers for {place}, whose "
                f"response has {len(pieces)} tokens ({''.join(pieces)[:60]!r}); it must give one a "
                "token, the end token included"
            )
        places = (f"token {t} of {place}" for t in range(len(values)))
        return torch.tensor(
            [_number(value, self.name, place) for value, place in zip(values, places, strict=True)]
        )


def load_function(name: str) -> Callable[..., Any]:
    """Import the function that package.module:name names.

    It may be a reward function, or a function that makes labelers or gold scores.

    Raises:
        ValueError: The name is misspelt, the module cannot be imported, or it has no such function.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"{name!r} names no function; write package.module:name")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"{name} is of Python's own library, of which no function can do this; name one that "
            "was written for it"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"cannot import {module_name} for {name!r} ({error}); start the program in the "
            "module's folder, or install it"
        ) from error
    except Exception as error:
        raise ValueError(
            f"cannot import {module_name} for {name!r}: {_describe(error)}; fix the module"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"{module_name} has no function {attribute!r}; it has {', '.join(names) or 'none'}"
        )
    return function


def row_name(i: int, prompts: Sequence[Prompt]) -> str:
    """Name a row of a batch in a message: its number, and the file and row of its prompt."""
    return f"row {i}{name_rows(prompts[i : i + 1])}"


Columns = Sequence[Sequence[Any]]
"""Prompt records, responses, and what else a function gets; each (batch,)."""


def columns_of(answers: Sequence[Answer]) -> tuple[list[Prompt], list[str]]:
    """Return the prompt records and the texts of answers."""
    return [one.record for one in answers], [one.text for one in answers]


def call_on_batch(
    function: Callable[..., Any], name: str, columns: Columns, expected: str
) -> list[Any]:
    """Call the function and return one entry per response.

    `expected` says in words what the function must return.

    Raises:
        ValueError: The function failed, or returned a wrong number of entries.
    """
    try:
        values = _call_with_copies(function, columns)
    except Exception as error:
        place = _failing_row(function, columns)
        raise ValueError(f"reward function {name} failed on {place}: {_describe(error)}") from error
    try:
        values = list(values)
    except TypeError:
        raise ValueError(
            f"reward function {name} returned {type(values).__name__}; it must return {expected}"
        ) from None
    num_rows = len(columns[0])
    if len(values) != num_rows:
        place = row_name(min(len(values), num_rows), columns[0])
        raise ValueError(
            f"reward function {name} returned {len(values)} entries for {num_rows} responses, and "
            f"the first difference is at {place}; it must return {expected}"
        )
    return values


def _call_with_copies(function: Callable[..., Any], columns: Columns) -> Any:
    """Call the function with copies of the lists, because it may change them."""
    prompts, responses, *others = columns
    return function(
        [prompt.prompt for prompt in prompts],
        list(responses),
        [dict(prompt.meta) for prompt in prompts],
        *(list(other) for other in others),
    )


def _failing_row(function: Callable[..., Any], columns: Columns) -> str:
    responses = columns[1]
    for i, response in enumerate(responses):
        try:
            _call_with_copies(function, [[column[i]] for column in columns])
        except Exception:
            return f"{row_name(i, columns[0])}, response {response[:60]!r}"
    return f"a batch of {len(responses)} rows, on none of them alone"


def _number(value: Any, name: str, place: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(
            f"reward function {name} gave {value!r} for {place}; it must give a finite number"
        )
    return number


def _describe(error: Exception) -> str:
    """Describe an error by its type and message, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
