"""Tests a user's function as a reward: what it sees, and errors that name the row."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.generation.answers import Answer
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.records import Prompt
from rlhf.rewards.functions import FunctionReward, TokenFunctionReward, load_function
from rlhf.rewards.load import load_reward
from rlhf.rewards.scores import Scored
from rlhf.rewards.settings import RewardSettings
from tests.rlhf.answers import of_text
from tests.rlhf.rewards.folders import base_tokenizer

PROMPTS = [Prompt("a", {"weight": 2.0}), Prompt("b", {"weight": 3.0})]


def function_reward(function: Callable[..., Any]) -> Scored:
    answers = [of_text(prompt, text) for prompt, text in zip(PROMPTS, ["x", ""], strict=True)]
    return FunctionReward(function, "own:reward").score(answers)


def token_reward(function: Callable[..., Any]) -> Scored:
    """Score the responses `hi<end>` and `h`, which has no end, by a function."""
    chat = Chat(base_tokenizer())
    responses = [chat.response_ids("hi"), chat.response_ids("h")[:-1]]
    answers = [
        Answer.of(FittedPrompt(prompt, (1,)), ids, chat)
        for prompt, ids in zip(PROMPTS, responses, strict=True)
    ]
    return TokenFunctionReward(function, "own:reward", chat).score(answers)


def test_a_function_sees_prompts_responses_and_meta() -> None:
    def reward(prompts: list[Any], responses: list[str], metas: list[dict[str, Any]]) -> list[Any]:
        assert prompts == ["a", "b"]
        return [len(r) + meta["weight"] for r, meta in zip(responses, metas, strict=True)]

    scored = function_reward(reward)
    assert scored.scores.tolist() == [3.0, 3.0]
    assert scored.token_rewards is None


def test_a_function_may_change_what_it_is_given() -> None:
    def reward(prompts: list[Any], responses: list[str], metas: list[dict[str, Any]]) -> list[Any]:
        metas[0]["weight"] = 9.0
        responses.clear()
        return [prompts.pop() and 1.0 for _ in metas]

    assert function_reward(reward).scores.tolist() == [1.0, 1.0]
    assert PROMPTS[0].meta == {"weight": 2.0}


def test_a_function_of_tokens_sees_their_texts_and_its_numbers_stand_at_them() -> None:
    def reward(
        prompts: list[Any], responses: list[str], metas: list[Any], tokens: list[list[str]]
    ) -> list[Any]:
        assert (prompts, responses) == (["a", "b"], ["hi", "h"])
        assert tokens == [["h", "i", "<end>"], ["h"]]
        return [torch.tensor([1.0, 0.5, -2.0]), [0.25]]

    scored = token_reward(reward)
    assert scored.token_rewards is not None
    assert scored.token_rewards.tolist() == [[1.0, 0.5, -2.0], [0.25, 0.0, 0.0]]
    assert scored.scores.tolist() == [-0.5, 0.25]
    assert scored.at_end.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda p, r, m: [1.0], "own:reward returned 1 entries for 2 responses.* row 1"),
        (lambda p, r, m: [1.0] * 3, "returned 3 entries for 2 responses.* row 2"),
        (lambda p, r, m: 1.0, "returned float; it must return a list with one number a response"),
        (lambda p, r, m: None, "returned NoneType"),
        (lambda p, r, m: [1.0, float("nan")], "gave nan for row 1; it must give a finite number"),
        (lambda p, r, m: [float("inf"), 1.0], "gave inf for row 0"),
        (lambda p, r, m: [1.0, "good"], "gave 'good' for row 1"),
        (lambda p, r, m: [1.0, None], "gave None for row 1"),
        (lambda p, r, m: [1 / len(x) for x in r], "failed on row 1, response '': ZeroDivision"),
        (lambda p: [1.0], r"failed on row 0, .*TypeError: .* takes 1 positional argument"),
        (lambda p, r, m: [1.0] if len(p) == 1 else 1 / 0, "failed on a batch of 2 rows, on none"),
    ],
)
def test_what_a_function_gets_wrong_is_told_with_its_row(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as told:
        function_reward(function)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda p, r, m, t: [[0.0] * 3], "returned 1 entries for 2 responses.* row 1"),
        (lambda p, r, m, t: 1.0, "returned float; it must return a list of lists"),
        (lambda p, r, m, t: [[0.0] * 3, 1.0], r"gave 1\.0 \(float\) for row 1.*one number a token"),
        (lambda p, r, m, t: [1.0, [0.0]], r"gave 1\.0 \(float\) for row 0.* 3 of them"),
        (
            lambda p, r, m, t: [[0.0] * 2, [0.0]],
            r"gave 2 numbers for row 0, whose response has 3 tokens \('hi<end>'\).*end token",
        ),
        (lambda p, r, m, t: [[0.0] * 3, [float("nan")]], "gave nan for token 0 of row 1"),
        (lambda p, r, m, t: [[0.0, float("-inf"), 0.0], [0.0]], "gave -inf for token 1 of row 0"),
        (lambda p, r, m, t: ["abc", [0.0]], "gave 'a' for token 0 of row 0"),
        (lambda p, r, m, t: [1 / (len(x) - 1) for x in t], "failed on row 1, .*ZeroDivisionError"),
        (lambda p, r, m: [], "failed on row 0, .*TypeError"),
    ],
)
def test_what_a_function_of_tokens_gets_wrong_is_told_with_its_row(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_reward(function)


@pytest.fixture
def own_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    path = tmp_path / "own_rewards.py"
    path.write_text("def short(p, r, m): return [-len(x) for x in r]\n")
    return path


def test_functions_are_found_by_name(own_rewards: Path) -> None:
    settings = RewardSettings(function="own_rewards:short")
    reward = load_reward(settings, Chat(base_tokenizer()), "cpu", 512)
    assert reward.score([of_text(Prompt("a"), "four")]).scores.tolist() == [-4.0]
    with pytest.raises(ValueError, match="has no function 'shrt'; it has short"):
        load_function("own_rewards:shrt")


def test_a_module_that_cannot_be_read_is_named_in_one_line(own_rewards: Path) -> None:
    own_rewards.write_text("def short(p, r, m):\nreturn []\n")
    with pytest.raises(ValueError, match=r"cannot import own_rewards .*IndentationError.*line 2"):
        load_function("own_rewards:short")
    own_rewards.write_text("raise RuntimeError('no\\nkey')\n")
    with pytest.raises(ValueError, match="RuntimeError: no key; fix the module"):
        load_function("own_rewards:short")


@pytest.mark.parametrize("name", ["own_rewards.short", ":short", "no_such_module:short"])
def test_misspelt_function_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"package\.module:name|cannot import no_such_module"):
        load_function(name)
