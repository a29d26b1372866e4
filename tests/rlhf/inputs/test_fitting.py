"""Prompts fit, or lose turns, or are dropped."""

import pytest

from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import fit_prompts
from rlhf.inputs.records import Prompt
from tests.rlhf.rewards.folders import base_tokenizer

TURNS = [
    {"role": "user", "content": "x" * 30},
    {"role": "assistant", "content": "y"},
    {"role": "user", "content": "Who?"},
]


def test_prompts_keep_their_order_and_the_rest_is_counted_and_named() -> None:
    chat = Chat(base_tokenizer())
    records = [
        Prompt("Who?", place="p.jsonl, row 1"),
        Prompt("z" * 50, place="p.jsonl, row 2"),
        Prompt(TURNS, place="p.jsonl, row 3"),
    ]
    short = tuple(chat.prompt_ids("Who?"))
    fitted = fit_prompts(records, chat, len(short))
    assert [prompt.record.place for prompt in fitted.kept] == ["p.jsonl, row 1", "p.jsonl, row 3"]
    assert [prompt.ids for prompt in fitted.kept] == [short, short]
    assert [prompt.is_cut for prompt in fitted.kept] == [False, True]
    assert (fitted.num_read, fitted.num_cut, fitted.dropped) == (3, 1, [records[1]])
    told = fitted.describe("max_prompt_tokens 9")
    assert told is not None
    assert told.startswith("of 3 prompts, 1 lost early turns and 1 were dropped")
    assert "p.jsonl, row 2" in told and "row 3" not in told
    assert told.endswith("to fit max_prompt_tokens 9")


def test_a_run_stops_if_too_many_prompts_are_dropped() -> None:
    chat = Chat(base_tokenizer())
    records = [Prompt("Who?"), Prompt("z" * 50, place="p.jsonl, row 2")]
    limit = len(chat.prompt_ids("Who?"))
    fitted = fit_prompts(records, chat, limit)
    fitted.check_dropped("max_prompt_tokens 9", 0.5)
    expected = (
        r"^1 of 2 prompts are over max_prompt_tokens 9 \(p.jsonl, row 2\); raise it, or "
        r"rollout.max_dropped 0.49 to go on without them$"
    )
    with pytest.raises(ValueError, match=expected):
        fitted.check_dropped("max_prompt_tokens 9", 0.49, "rollout.max_dropped")
    none_fits = fit_prompts(records[1:], chat, limit)
    with pytest.raises(ValueError, match=r"^1 of 1 prompts are over"):
        none_fits.check_dropped("max_prompt_tokens 9", 1.0)


def test_nothing_is_said_where_all_fit() -> None:
    chat = Chat(base_tokenizer())
    assert fit_prompts([Prompt("Who?")], chat, 99).describe("max_prompt_tokens 99") is None
