"""Converts hand-written rows in each public layout, and counts those of real files, if present."""

import gzip
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.convert.formats import (
    CONVERTERS,
    Changed,
    Dropped,
    LayoutError,
    parse_transcript,
    ranks_from_scores,
)
from data.convert.program import ConvertConfig, convert
from data.convert.readers import split_documents, strip_gutenberg
from rlhf.inputs.files import read_records
from rlhf.inputs.records import (
    LAYOUTS as KNOWN_LAYOUTS,
)
from rlhf.inputs.records import (
    RECORD_CLASSES,
    Demonstration,
    Prompt,
    Ranking,
    Record,
    RecordError,
    Text,
)

SHARED = Path(__file__).parents[3] / "shared" / "data"


def run(format: str, kind: str, row: Any) -> list[Record | Dropped | Changed]:
    return list(CONVERTERS[format][kind](row))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def hh(*turns: str) -> str:
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))


HH_ROW = {
    "chosen": hh("Is tea hot?", "Often.", "And ice?\n\nI mean water ice.", " Never. "),
    "rejected": hh("Is tea hot?", "Often.", "And ice?\n\nI mean water ice.", "Yes."),
}
HH_PROMPT = [user("Is tea hot?"), assistant("Often."), user("And ice?\n\nI mean water ice.")]


def test_hh() -> None:
    ranking = Ranking(HH_PROMPT, ("Never.", "Yes."), (1, 2), source="hh")
    assert run("hh", "ranking", HH_ROW) == [ranking]
    assert run("hh", "demonstration", HH_ROW) == [Demonstration(HH_PROMPT, "Never.")]
    assert run("hh", "prompt", HH_ROW) == [Prompt(HH_PROMPT)]


def test_hh_with_one_turn_has_a_string_prompt() -> None:
    row = {"chosen": hh("Hi", "Hello."), "rejected": hh("Hi", "")}
    assert run("hh", "ranking", row) == [Ranking("Hi", ("Hello.", ""), (1, 2), source="hh")]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (hh("Hi", "a", "More", "b"), hh("Hi", "a"), "chosen and rejected have different prompts"),
        (hh("Hi", "same"), hh("Hi", "same "), "chosen and rejected are equal"),
        (hh("", "a"), hh("", "b"), "no prompt"),
        (
            hh("Hi", "a") + "\n\nAssistant: b",
            hh("Hi", "a") + "\n\nAssistant: c",
            "the prompt does not end with a user turn",
        ),
    ],
)
def test_hh_rows_that_are_dropped(chosen: str, rejected: str, reason: str) -> None:
    assert run("hh", "ranking", {"chosen": chosen, "rejected": rejected}) == [Dropped(reason)]


def test_hh_neighbouring_turns_of_one_speaker_are_joined_inside_a_prompt() -> None:
    start = "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant:"
    row = {"chosen": f"{start} a", "rejected": f"{start} b"}
    assert run("hh", "prompt", row) == [Prompt("One.\n\nTwo.")]


def test_hh_without_a_last_assistant_turn_is_another_layout() -> None:
    with pytest.raises(LayoutError, match="does not end with an `Assistant:` turn"):
        run("hh", "ranking", {"chosen": hh("Hi"), "rejected": hh("Hi")})


def test_a_mark_inside_a_line_starts_no_turn() -> None:
    assert parse_transcript("Say Human: or Assistant: aloud") == [
        user("Say Human: or Assistant: aloud")
    ]


TLDR_ROW = {
    "info": {"id": "t3_x", "post": "I lost my hat.\n", "title": "Hat", "subreddit": "hats"},
    "summaries": [
        {"text": " Where is it?", "policy": "sup1", "note": "ok"},
        {"text": " Lost my hat.", "policy": "ref", "note": "ok"},
    ],
    "choice": 1,
    "worker": "ann",
    "batch": "batch0",
    "split": "train",
    "extra": {},
}
TLDR_PROMPT = "SUBREDDIT: r/hats\n\nTITLE: Hat\n\nPOST: I lost my hat.\n\nTL;DR:"


def test_tldr() -> None:
    summaries = ("Lost my hat.", "Where is it?")
    ranking = Ranking(TLDR_PROMPT, summaries, (1, 2), source="tldr", labeler="ann")
    assert run("tldr", "ranking", TLDR_ROW) == [ranking]
    assert run("tldr", "demonstration", TLDR_ROW) == [Demonstration(TLDR_PROMPT, summaries[0])]
    assert run("tldr", "prompt", TLDR_ROW) == [Prompt(TLDR_PROMPT)]


def test_tldr_news_article() -> None:
    info = {"id": "a", "article": "It rained.", "post": None, "title": None, "subreddit": None}
    assert run("tldr", "prompt", TLDR_ROW | {"info": info}) == [
        Prompt("Article:\nIt rained.\n\nTL;DR:")
    ]


def completion(text: str, overall: Any, *ratings: str) -> dict[str, Any]:
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    annotations = {
        name: {"Rating": rating, "Rationale": "..."}
        for name, rating in zip(aspects, ratings, strict=False)
    }
    return {"response": text, "model": "m", "overall_score": overall, "annotations": annotations}


ULTRAFEEDBACK_ROW = {
    "source": "evol_instruct",
    "instruction": "Name a fruit.",
    "models": ["a", "b", "c", "d"],
    "completions": [
        completion("car", 10, "1", "2", "1", "N/A"),
        completion("fig", 8.5, "5", "5", "5", "5"),
        completion("kiwi", 7.0, "5", "5", "5", "5"),
        completion("", None),
    ],
}


def test_ultrafeedback_ranks_by_ratings_before_overall_score() -> None:
    responses = ("car", "fig", "kiwi", "")
    ranks = (3, 1, 1, None)
    expected = Ranking("Name a fruit.", responses, ranks, source="ultrafeedback", labeler="gpt-4")
    assert run("ultrafeedback", "ranking", ULTRAFEEDBACK_ROW) == [expected]
    assert run("ultrafeedback", "demonstration", ULTRAFEEDBACK_ROW) == [
        Demonstration("Name a fruit.", "fig")
    ]
    assert run("ultrafeedback", "prompt", ULTRAFEEDBACK_ROW) == [Prompt("Name a fruit.")]


def test_ultrafeedback_falls_back_to_overall_score_and_drops_what_has_no_order() -> None:
    by_score = {
        "instruction": "p",
        "completions": [completion("a", 3), completion("b", 7.5), completion("c", 3.0)],
    }
    [ranking] = run("ultrafeedback", "ranking", by_score)
    assert isinstance(ranking, Ranking)
    assert ranking.ranks == (2, 1, 2)
    by_score["completions"] = [completion("a", "nan"), completion("b", 1), completion("c", 2)]
    [ranking] = run("ultrafeedback", "ranking", by_score)
    assert isinstance(ranking, Ranking)
    assert ranking.ranks == (None, 2, 1)
    tied = {"instruction": "p", "completions": [completion("a", 3), completion("b", 3)]}
    assert run("ultrafeedback", "ranking", tied) == [Dropped("no response is ranked above another")]
    one = {"instruction": "p", "completions": [completion("a", 3)]}
    assert run("ultrafeedback", "ranking", one) == [Dropped("fewer than two responses")]


def test_ranks_from_scores() -> None:
    assert ranks_from_scores([2.0, 9.0, None, 9.0, -1.0]) == (3, 1, None, 1, 4)


def node(text: str, role: str, *replies: dict[str, Any], **extra: Any) -> dict[str, Any]:
    return {"message_id": text, "text": text, "role": role, "replies": list(replies), **extra}


OASST_ROW = {
    "message_tree_id": "1",
    "tree_state": "ready_for_export",
    "prompt": node(
        "Question",
        "prompter",
        node("Worse", "assistant", rank=1),
        node(
            "Better",
            "assistant",
            node("Why?", "prompter", node("Because.", "assistant", rank=None)),
            node("Thanks", "prompter"),
            rank=0,
        ),
        node("Unranked", "assistant"),
        node("Spam", "assistant", deleted=True, rank=2),
    ),
}


def test_oasst_walks_the_tree() -> None:
    history = [user("Question"), assistant("Better")]
    ranking = Ranking(
        "Question", ("Worse", "Better", "Unranked"), (2, 1, None), source="oasst", labeler="human"
    )
    assert (
        run("oasst", "ranking", OASST_ROW) == [ranking] + [Dropped("fewer than two responses")] * 2
    )
    assert run("oasst", "demonstration", OASST_ROW) == [
        Demonstration("Question", "Better"),
        Demonstration([*history, user("Why?")], "Because."),
        Dropped("no response"),
    ]
    assert run("oasst", "prompt", OASST_ROW) == [
        Prompt("Question"),
        Prompt([*history, user("Why?")]),
        Prompt([*history, user("Thanks")]),
    ]


KWISE_ROW = {
    "prompt": "Human: Hi\n\nAssistant: Hello.\n\nHuman: Name a fruit.",
    "responses": [
        {"text": "car", "rank": 3, "score": 1.0, "model": "a"},
        {"text": "fig", "rank": 1, "score": 9.0, "model": "b"},
        {"text": "kiwi", "rank": 1, "model": "c"},
    ],
    "source": "made_up",
    "judge": "human",
    "license": "MIT",
}


def test_kwise() -> None:
    prompt = [user("Hi"), assistant("Hello."), user("Name a fruit.")]
    expected = Ranking(prompt, ("car", "fig", "kiwi"), (3, 1, 1), "made_up", "human")
    assert run("kwise", "ranking", KWISE_ROW) == [expected]
    assert run("kwise", "demonstration", KWISE_ROW) == [Demonstration(prompt, "fig")]
    assert run("kwise", "prompt", KWISE_ROW) == [Prompt(prompt)]


def test_kwise_conversation_that_the_assistant_opens_is_cut_and_counted() -> None:
    row = KWISE_ROW | {"prompt": "Assistant: Hello.\n\nHuman: Name a fruit."}
    assert run("kwise", "prompt", row) == [
        Changed("an assistant turn before the first user turn was cut off"),
        Prompt("Name a fruit."),
    ]


@pytest.mark.parametrize(
    ("format", "row", "prompt", "response"),
    [
        (
            "alpaca",
            {"instruction": "Add. ", "input": "1, 2", "output": "3\n"},
            "Add.\n\n1, 2",
            "3",
        ),
        ("alpaca", {"instruction": "Greet.", "input": "", "output": "Hi"}, "Greet.", "Hi"),
        ("alpaca", {"instruction": "Greet.", "output": "Hi"}, "Greet.", "Hi"),
        (
            "dolly",
            {"instruction": "Who?", "context": "Ann did.", "response": "Ann", "category": "qa"},
            "Who?\n\nAnn did.",
            "Ann",
        ),
        (
            "self_instruct",
            {"id": "1", "instruction": "Add.", "instances": [{"input": "1, 2", "output": "3"}]},
            "Add.\n\n1, 2",
            "3",
        ),
        (
            "gsm8k",
            {"question": "4 / 2 + 998?", "answer": "4/2=<<4/2=2>>2 and so 1,000\n#### 1,000"},
            "4 / 2 + 998?",
            "4/2=2 and so 1,000\n#### 1,000",
        ),
        ("p3", {"prompt": "Yes?\n", "completion": "no<|endoftext|>"}, "Yes?", "no"),
    ],
)
def test_instruction_data(format: str, row: Any, prompt: str, response: str) -> None:
    assert run(format, "demonstration", row) == [Demonstration(prompt, response)]
    [made] = run(format, "prompt", row)
    assert isinstance(made, Prompt)
    assert made.prompt == prompt


def test_self_instruct_makes_one_demonstration_an_instance() -> None:
    instances = [{"input": "1, 2", "output": "3"}, {"input": "2, 2", "output": "4"}]
    row = {"instruction": "Add.", "instances": instances}
    assert run("self_instruct", "demonstration", row) == [
        Demonstration("Add.\n\n1, 2", "3"),
        Demonstration("Add.\n\n2, 2", "4"),
    ]


def test_answers_travel_with_the_prompts() -> None:
    row = {"question": "q", "answer": "a <<1+1=2>>\n#### 1,000"}
    assert run("gsm8k", "prompt", row) == [Prompt("q", {"answer": "1000"})]
    assert run("gsm8k", "prompt", row | {"answer": "2"}) == [Dropped("no final answer after ####")]
    p3 = {"prompt": "q", "completion": "no<|endoftext|>"}
    assert run("p3", "prompt", p3) == [Prompt("q", {"answer": "no"})]


def test_p3_rows_that_only_end_are_dropped() -> None:
    row = {"prompt": "q", "completion": "<|endoftext|>"}
    assert run("p3", "demonstration", row) == [Dropped("no response")]
    assert run("p3", "prompt", row) == [Dropped("no response")]


def test_prompt_files() -> None:
    assert run("strings", "prompt", "Hello\n") == [Prompt("Hello")]
    assert run("strings", "prompt", " ") == [Dropped("no prompt")]
    ifeval = {
        "key": 7,
        "prompt": "Write.",
        "instruction_id_list": ["punctuation:no_comma"],
        "kwargs": [{}],
    }
    meta = {"key": 7, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    assert run("ifeval", "prompt", ifeval) == [Prompt("Write.", meta)]
    mt_bench = {"question_id": 81, "category": "writing", "turns": ["First.", "Second."]}
    assert run("mt_bench", "prompt", mt_bench) == [
        Prompt("First.", {"follow_ups": ["Second."], "question_id": 81, "category": "writing"})
    ]


SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATION = [SYSTEM, user("Hi"), assistant("Hello."), user("Bye"), assistant(" See you.\n")]
SHAREGPT_ROW = {
    "id": "x",
    "system": "Be brief.",
    "conversations": [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Bye"},
        {"from": "gpt", "value": "See you."},
    ],
}
ASKED = CONVERSATION[:-1]


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("messages", {"messages": CONVERSATION}),
        ("messages", {"messages": [*ASKED, assistant([{"type": "text", "text": "See you."}])]}),
        ("sharegpt", SHAREGPT_ROW),
        ("sharegpt", {"conversation": CONVERSATION}),
        ("preference", {"prompt": ASKED, "chosen": "See you.", "rejected": "No."}),
        ("prompt_completion", {"prompt": ASKED, "completion": "See you."}),
        ("prompt_completion", {"prompt": ASKED, "completion": [assistant("See you.")]}),
        ("prompt_completion", {"prompt": ASKED, "completion": CONVERSATION[1:]}),
    ],
)
def test_conversations(format: str, row: Any) -> None:
    assert run(format, "demonstration", row) == [Demonstration(ASKED, "See you.")]
    assert run(format, "prompt", row) == [Prompt(ASKED)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yes.", "rejected": "No."},
        {"prompt": [user("Hi")], "chosen": [assistant("Yes.")], "rejected": [assistant("No.")]},
        {
            "prompt": "Hi",
            "chosen": [user("Hi"), assistant("Yes.")],
            "rejected": [user("Hi"), assistant("No.")],
        },
        {"chosen": [user("Hi"), assistant("Yes.")], "rejected": [user("Hi"), assistant("No.")]},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " Yes.", "rejected": " No."},
    ],
)
def test_preferences(row: Any) -> None:
    ranking = Ranking("Hi", ("Yes.", "No."), (1, 2))
    assert run("preference", "ranking", row | {"score_chosen": 9.0}) == [ranking]
    assert run("preference", "demonstration", row) == [Demonstration("Hi", "Yes.")]
    assert run("preference", "prompt", row) == [Prompt("Hi")]


@pytest.mark.parametrize(
    ("format", "row", "reason"),
    [
        ("messages", {"messages": [user("Hi")]}, "does not end with an assistant turn"),
        ("messages", {"messages": [user("Hi"), assistant("")]}, "no response"),
        ("messages", {"messages": [user("Hi"), assistant(None)]}, "a turn that is no text"),
        ("messages", {"messages": [user("Hi"), SYSTEM, assistant("a")]}, "not the first"),
        ("messages", {"messages": [{"role": "tool", "content": "3"}]}, "of the role 'tool'"),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "b "}, "are equal"),
        (
            "preference",
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            "different prompts",
        ),
        ("prompt_completion", {"prompt": "a", "completion": "b", "label": False}, "not liked"),
    ],
)
def test_chat_rows_that_are_dropped(format: str, row: Any, reason: str) -> None:
    [dropped] = run(format, next(iter(CONVERTERS[format])), row)
    assert isinstance(dropped, Dropped) and reason in dropped.reason


def test_two_columns_of_any_name(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows.write_text('{"question": "Hi?", "answer": "Ho.", "id": 3}\n')
    settings: dict[str, Any] = {"format": "columns", "input": str(rows), "output": str(out)}
    columns: dict[str, Any] = {"prompt_column": "question", "response_column": "answer"}
    convert(ConvertConfig(**settings, **columns))
    assert read_records(out, Demonstration) == [Demonstration("Hi?", "Ho.")]
    convert(ConvertConfig(**settings, **columns, kind="prompt", overwrite=True))
    assert read_records(out, Prompt) == [Prompt("Hi?", {"answer": "Ho."})]
    with pytest.raises(ValueError, match=r"row 1: no field 'prompt' \(found: question, answer, id"):
        convert(ConvertConfig(**settings, overwrite=True))
    with pytest.raises(ValueError, match="prompt_column is 'question' and format is hh"):
        ConvertConfig(format="hh", input="a", output="b.jsonl", prompt_column="question")


def test_the_checker_names_formats_that_there_are() -> None:
    assert {layout for _, layout in KNOWN_LAYOUTS} <= set(CONVERTERS)


def test_the_command_offers_every_converter() -> None:
    choices = get_type_hints(ConvertConfig)["format"]
    assert set(get_args(choices)) == set(CONVERTERS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 4) | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
LAYOUTS: list[tuple[str, Any]] = [
    ("hh", HH_ROW),
    ("tldr", TLDR_ROW),
    ("ultrafeedback", ULTRAFEEDBACK_ROW),
    ("oasst", OASST_ROW),
    ("kwise", KWISE_ROW),
    ("alpaca", {"instruction": "a", "input": "b", "output": "c"}),
    ("dolly", {"instruction": "a", "context": "b", "response": "c"}),
    ("self_instruct", {"instruction": "a", "instances": [{"input": "b", "output": "c"}]}),
    ("gsm8k", {"question": "a", "answer": "#### 1"}),
    ("p3", {"prompt": "a", "completion": "b"}),
    ("messages", {"messages": CONVERSATION}),
    ("sharegpt", SHAREGPT_ROW),
    ("preference", {"prompt": "a", "chosen": CONVERSATION, "rejected": "c"}),
    ("prompt_completion", {"prompt": "a", "completion": CONVERSATION}),
    ("columns", {"prompt": "a", "response": "b"}),
    ("strings", "a"),
    ("ifeval", {"key": 1, "prompt": "a", "instruction_id_list": [], "kwargs": []}),
    ("mt_bench", {"question_id": 1, "category": "a", "turns": ["b", "c"]}),
    ("text", {"text": "a"}),
]


def spoil(draw: st.DrawFn, value: Any) -> Any:
    """Replace one part of the value, however deep, by anything."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 3)):
        keys: Sequence[Any] = list(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(keys))
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[key] = spoil(draw, value[key])
        return copy
    return draw(json_values)


@st.composite
def spoilt_rows(draw: st.DrawFn) -> tuple[str, str, Any]:
    format, row = draw(st.sampled_from(LAYOUTS))
    return format, draw(st.sampled_from(list(CONVERTERS[format]))), spoil(draw, row)


@given(spoilt_rows())
@settings(deadline=None)
def test_a_spoilt_row_is_converted_dropped_or_named(case: tuple[str, str, Any]) -> None:
    format, kind, row = case
    try:
        items = run(format, kind, row)
    except (LayoutError, RecordError):
        return
    assert all(isinstance(item, RECORD_CLASSES[kind] | Dropped | Changed) for item in items)


def test_gutenberg_header_and_licence_are_stripped() -> None:
    book = (
        "The Project Gutenberg EBook\n\n*** START OF THIS PROJECT GUTENBERG EBOOK A BOOK ***\n\n"
        "Produced by Ann\nand others\n\nChapter 1\n\n*** \n\nIt began.\n\n"
        "End of the Project Gutenberg EBook of A Book,\nby Ann\n\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK A BOOK ***\n\n"
        "*** START: FULL LICENSE ***\nEnd."
    )
    assert strip_gutenberg(book).strip() == "Chapter 1\n\n*** \n\nIt began."
    assert strip_gutenberg("*** no book ***") == "*** no book ***"


def test_paragraphs_are_joined_up_to_the_limit_and_cut_at_white_space() -> None:
    text = "aa aa\n\nbb\n \ncccc\n\ndd dd dd dd dd\n\neeeeeeeeeeeeeee"
    assert split_documents(text, 10) == [
        "aa aa\n\nbb",
        "cccc",
        "dd dd dd",
        "dd dd",
        *["e" * 10, "e" * 5],
    ]


@given(st.text(st.sampled_from("ab \n")), st.integers(1, 9))
@settings(deadline=None)
def test_splitting_loses_only_white_space(text: str, max_characters: int) -> None:
    documents = split_documents(text, max_characters)
    assert "".join("".join(documents).split()) == "".join(text.split())
    assert all(0 < len(document) <= max_characters for document in documents)


def make(tmp_path: Path, name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def test_convert_writes_what_it_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [HH_ROW, {"chosen": hh("Hi", "x"), "rejected": hh("Hi", "x")}, HH_ROW]
    source = make(tmp_path, "hh.jsonl.gz", "\n".join(map(json.dumps, rows)))
    output = str(tmp_path / "out" / "rankings.jsonl")
    counts = convert(ConvertConfig(format="hh", input=source, output=output))
    assert len(read_records(output, Ranking)) == counts.num_written == 2
    printed = capsys.readouterr().out
    assert "rows read 3, records written 2, dropped 1, changed 0" in printed
    assert "dropped 1: chosen and rejected are equal" in printed
    first: dict[str, Any] = {"limit": 1, "kind": "prompt", "overwrite": True}
    convert(ConvertConfig(format="hh", input=source, output=output, **first))
    assert read_records(output, Prompt) == [Prompt(HH_PROMPT)]


@pytest.mark.parametrize("separator", [",\n", "\n"])
def test_json_files_hold_a_list_or_lines(tmp_path: Path, separator: str) -> None:
    rows = separator.join(
        json.dumps({"instruction": name, "input": "", "output": "x"}) for name in "ab"
    )
    source = make(tmp_path, "alpaca.json", f"[{rows}]" if separator == ",\n" else rows)
    output = str(tmp_path / "out.jsonl")
    convert(ConvertConfig(format="alpaca", input=source, output=output))
    assert read_records(output, Demonstration) == [Demonstration("a", "x"), Demonstration("b", "x")]


def test_text_files_and_text_rows(tmp_path: Path) -> None:
    make(tmp_path, "b.txt.gz", "One.\r\n\r\nTwo.")
    make(tmp_path, "a.txt", "\ufeffFirst file, longer than that.")
    output = str(tmp_path / "out.jsonl")
    convert(ConvertConfig(format="text", input=str(tmp_path), output=output, max_characters=16))
    assert [record.text for record in read_records(output, Text)] == [
        "First file,",
        "longer than",
        "that.",
        "One.\n\nTwo.",
    ]
    source = make(tmp_path, "rows.jsonl", '{"text": "Three."}\n{"text": ""}')
    counts = convert(ConvertConfig(format="text", input=source, output=output, overwrite=True))
    assert read_records(output, Text) == [Text("Three.")]
    assert counts.dropped == {"no text": 1}


@pytest.mark.parametrize(
    ("format", "name", "content", "words"),
    [
        ("hh", "x.jsonl", "", "x.jsonl is empty: no rows to convert"),
        ("text", "x.txt", " \n", "x.txt is empty: no rows to convert"),
        (
            "hh",
            "x.jsonl",
            '{"question": "a"}',
            "row 1: no field 'chosen' (found: question); is --f",
        ),
        ("hh", "x.jsonl", '{"chosen": 3, "rejected": ""}', "field 'chosen': expected str, found 3"),
        ("p3", "x.jsonl", '{"prompt": "a", "completion": ""}', "dropped 1: no response"),
        ("text", "x.txt", b"caf\xe9", "byte 0xe9 at byte 4, which is not UTF-8"),
        ("strings", "x.jsonl", b'"a"\n"\xe9"', "row 2: field 'row': found byte 0xe9"),
        ("strings", "x.jsonl", '"a"\nb', "row 2: field 'row': found 'b"),
        ("alpaca", "x.json", "[1, 2", "is neither a JSON list nor JSON Lines"),
        ("alpaca", "x.csv", "a", "expected a file ending in .jsonl or .jsonl.gz or .json"),
        ("strings", "x.jsonl", r'"\ud800"', "row 1: field 'prompt': found half of a surrogate"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(
    tmp_path: Path, format: Any, name: str, content: str | bytes, words: str
) -> None:
    source = make(tmp_path, name, content)
    output = tmp_path / "out.jsonl"
    with pytest.raises(ValueError) as raised:
        convert(ConvertConfig(format=format, input=source, output=str(output)))
    assert words in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"kind": "ranking"},
            "format gsm8k has no kind ranking; give one of demonstration, prompt",
        ),
        ({"output": "out.json"}, "give a name in .jsonl or .jsonl.gz"),
        ({"output": "./in.jsonl"}, "input and output are both 'in.jsonl'"),
        ({"limit": 0}, "limit is 0"),
        ({"max_characters": 0}, "max_characters is 0"),
    ],
)
def test_contradictory_settings_are_refused(changes: dict[str, Any], words: str) -> None:
    given_settings: dict[str, Any] = {
        "format": "gsm8k",
        "input": "in.jsonl",
        "output": "out.jsonl",
    } | changes
    with pytest.raises(ValueError) as raised:
        ConvertConfig(**given_settings)
    assert words in str(raised.value)


AT_WORK = """
import sys, time
from data.convert import program

def read(source):
    print("reads", flush=True)
    time.sleep(60)
    yield "line 1", "one"

program.read_source = read
program.convert(program.ConvertConfig(format="strings", input=sys.argv[1], output=sys.argv[2]))
"""


def test_two_conversions_at_once_do_not_write_one_file(tmp_path: Path) -> None:
    source, output = make(tmp_path, "in.jsonl", '"a prompt"\n'), tmp_path / "out" / "out.jsonl"
    config = ConvertConfig(format="strings", input=source, output=str(output))
    command = [sys.executable, "-c", AT_WORK, source, str(output)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8") as first:
        assert first.stdout is not None
        while first.stdout.readline() != "reads\n":
            assert first.poll() is None
        with pytest.raises(ValueError, match=rf"out\.jsonl is in use: process {first.pid} on"):
            convert(config)
        first.kill()
    assert not output.exists()
    convert(config)
    assert [record.prompt for record in read_records(output, Prompt)] == ["a prompt"]


def test_the_command_ends_with_one_line_and_no_traceback(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    words = ["--format", "hh", "--input", str(tmp_path / "none.jsonl"), "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-m", "data.convert", *words], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "none.jsonl does not exist" in done.stderr
    assert not output.exists()


@pytest.mark.skipif(not SHARED.exists(), reason="needs the real files in ../shared/data")
@pytest.mark.parametrize(
    ("format", "kind", "file", "num_written", "dropped"),
    [
        ("hh", "ranking", "hh_rlhf/harmless-base.test.jsonl.gz", 2307, 5),
        ("hh", "demonstration", "hh_rlhf/harmless-base.test.jsonl.gz", 2304, 8),
        ("oasst", "ranking", "open_assistant/en_100_tree.jsonl", 212, 268),
        ("oasst", "demonstration", "open_assistant/en_100_tree.jsonl", 252, 228),
        ("kwise", "ranking", "rankings/rankings.jsonl.gz", 352, 0),
        ("alpaca", "demonstration", "alpaca_en_demo/alpaca_en_demo.json", 999, 0),
        ("self_instruct", "demonstration", "self_instruct/seed_tasks.jsonl", 175, 0),
        ("gsm8k", "prompt", "gsm8k/test.jsonl.gz", 1319, 0),
        ("p3", "demonstration", "t0_p3_sample", 4200, 200),
        ("strings", "prompt", "open_assistant/prompt_lottery_en_250_text.jsonl", 250, 0),
        ("ifeval", "prompt", "ifeval/input_data.jsonl", 541, 0),
        ("mt_bench", "prompt", "mt_bench/question.jsonl", 80, 0),
        ("text", "text", "gutenberg", 1078, 0),
    ],
)
def test_real_files(
    tmp_path: Path, format: Any, kind: Any, file: str, num_written: int, dropped: int
) -> None:
    output = str(tmp_path / "out.jsonl.gz")
    counts = convert(
        ConvertConfig(format=format, kind=kind, input=str(SHARED / file), output=output)
    )
    assert (counts.num_written, counts.dropped.total()) == (num_written, dropped)
    records = read_records(output, RECORD_CLASSES[kind])
    assert len(records) == num_written
    if kind == "ranking":
        assert all(record.pairs() for record in records if isinstance(record, Ranking))
    if format == "text":
        assert not any(
            "Project Gutenberg" in record.text for record in records if isinstance(record, Text)
        )
