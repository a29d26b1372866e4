"""Tests instructions that a program checks: each check by hand, and the prompts they make."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from data.instructions import follows, make_gold
from data.instructions.build import IFEVAL, OPEN_ASSISTANT, InstructionsConfig, build
from data.instructions.checks import CHECKS, count_word, follows_one, sentences, words
from data.instructions.ifeval import (
    from_ifeval,
    grade,
    keep_known,
    known_prompts,
    mean_of_all,
)
from data.instructions.templates import DRAWS, NUM_GROUPS, draw_instructions, in_words
from rlhf.inputs.files import read_records
from rlhf.inputs.records import Prompt


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Don't use well-known words.", 4),
        ("  one\ttwo\n\nthree  ", 3),
        ("3.5 is 7/2", 5),
        ("... !", 0),
        ("'quoted' words' end", 3),
        ("Caf\u00e9 na\u00efve \u4f60\u597d", 3),
    ],
)
def test_words(text: str, count: int) -> None:
    assert len(words(text)) == count


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("no capitals here. none there either.", ["no capitals here.", "none there either."]),
        ("Dr. Smith met Mr. J. R. Jones at 3.5 p.m. today.", 1),
        ("I use tools, e.g. hammers. They help.", 2),
        ("Really?! Yes... no.", ["Really?!", "Yes...", "no."]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("(It ended.) So what", ["(It ended.)", "So what"]),
        ("Without an end", 1),
        ("1. Mix it.\n2. Bake it.", ["1. Mix it.", "2. Bake it."]),
        ("It was 1999. Then came 2000.", 2),
        ("So did I. And you?", 2),
        ("See example.com for more.", 1),
        ("* a line\n* another line", 1),
        ("...", 0),
        ("", 0),
    ],
)
def test_sentences(text: str, found: list[str] | int) -> None:
    if isinstance(found, int):
        assert len(sentences(text)) == found
    else:
        assert sentences(text) == found


@pytest.mark.parametrize(
    ("text", "word", "count"),
    [
        ("The other day, THE cat", "the", 2),
        ("category cat's cat", "cat", 2),
        ("c++ and c", "c++", 1),
        ("New York, new york and new", "new york", 2),
        ("un_the", "the", 0),
    ],
)
def test_a_word_counts_where_it_stands_by_itself(text: str, word: str, count: int) -> None:
    assert count_word(text, word) == count


FOLLOWED: list[tuple[dict[str, Any], str, str]] = [
    ({"kind": "no_comma"}, "one two", "one, two"),
    ({"kind": "no_comma"}, "a; b", "\u4f60\uff0c\u597d ok"),
    ({"kind": "lowercase"}, "all small, 3 words!", "All small"),
    ({"kind": "lowercase"}, "\u00e9t\u00e9", "123"),
    ({"kind": "uppercase"}, "ALL BIG, 3 WORDS!", "ALL BIg"),
    ({"kind": "uppercase"}, "A", "123"),
    ({"kind": "quoted"}, ' "whole answer" \n', '"half" answer'),
    ({"kind": "quoted"}, "\u201cwhole\u201d", '\u201cmixed"'),
    ({"kind": "quoted"}, '"a" and "b"', '"cut off'),
    ({"kind": "words_at_least", "count": 3}, "one two three", "one two -"),
    ({"kind": "words_at_most", "count": 3}, "one two three", "one two three four"),
    ({"kind": "sentences_at_least", "count": 2}, "One. Two", "One, two"),
    ({"kind": "sentences_at_most", "count": 1}, "Mr. One.", "One. Two"),
    ({"kind": "contains", "words": ["time", "day"]}, "Day time", "daytime"),
    ({"kind": "avoids", "words": ["the", "and"]}, "other hands", "hand and foot"),
    ({"kind": "times_at_least", "word": "a", "count": 2}, "A a", "a an"),
    ({"kind": "times_at_most", "word": "a", "count": 1}, "a an", "a A"),
    ({"kind": "characters_at_least", "character": "!", "count": 2}, "no! no!", "no!"),
    ({"kind": "characters_at_least", "character": "o", "count": 2}, "Oo", "o"),
    ({"kind": "characters_at_most", "character": "c", "count": 0}, "none here", "no C"),
    ({"kind": "ends_with", "phrase": "That is all."}, 'so. that is all."\n', "That is all. Bye"),
    ({"kind": "ends_with", "phrase": "Any questions?"}, "Any questions?", "Any questions"),
    ({"kind": "bullets", "count": 2}, "Two:\n* a\n - b", "* a"),
    ({"kind": "bullets", "count": 2}, '"* a\n* b"', "*bold* a\n-b\n* c"),
    ({"kind": "bullets", "count": 1}, "well-known * a\n\u2022 b", "* a\n* b"),
]


@pytest.mark.parametrize(("instruction", "good", "bad"), FOLLOWED)
def test_each_check(instruction: dict[str, Any], good: str, bad: str) -> None:
    assert follows_one(good, instruction)
    assert not follows_one(bad, instruction)


def test_every_kind_was_tried_above() -> None:
    assert {instruction["kind"] for instruction, _, _ in FOLLOWED} == set(CHECKS)


@pytest.mark.parametrize("nothing", ["", "  \n", "...", "\u2022"])
def test_silence_follows_nothing(nothing: str) -> None:
    assert not follows_one(nothing, {"kind": "no_comma"})
    assert not follows_one(nothing, {"kind": "words_at_most", "count": 5})


def test_the_reward_is_the_share_of_the_instructions_followed() -> None:
    three = [
        {"kind": "no_comma"},
        {"kind": "lowercase"},
        {"kind": "words_at_least", "count": 2},
    ]
    metas = [{"instructions": three}] * 3 + [{"instructions": three[:1]}]
    responses = ["one two", "One", "", "no comma"]
    assert follows(["p"] * 4, responses, metas) == [1.0, pytest.approx(1 / 3), 0.0, 1.0]


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({}, r"prompt 0 has no meta\.instructions"),
        ({"instructions": []}, r"prompt 0 has no meta\.instructions"),
        ({"instructions": [{"kind": "no_coma"}]}, "'no_coma'; did you mean no_comma"),
        ({"instructions": [{"kind": "words_at_most"}]}, "words_at_most.*missing.*count"),
    ],
)
def test_prompts_without_instructions_are_refused(meta: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        follows(["p"], ["a response"], [meta])


@pytest.mark.parametrize(
    ("name", "kwargs", "instruction"),
    [
        ("punctuation:no_comma", {}, {"kind": "no_comma"}),
        (
            "length_constraints:number_words",
            {"relation": "less than", "num_words": 151},
            {"kind": "words_at_most", "count": 150},
        ),
        (
            "length_constraints:number_sentences",
            {"relation": "at least", "num_sentences": 2},
            {"kind": "sentences_at_least", "count": 2},
        ),
        (
            "keywords:letter_frequency",
            {"let_relation": "less than", "letter": "t", "let_frequency": 2},
            {"kind": "characters_at_most", "character": "t", "count": 1},
        ),
        ("detectable_format:json_format", {}, None),
    ],
)
def test_ifeval_in_our_terms(name: str, kwargs: dict[str, Any], instruction: Any) -> None:
    assert from_ifeval(name, kwargs) == instruction


def test_prompts_of_ifeval_that_need_more_than_few_tokens_are_left_out() -> None:
    def prompt(text: str, *rows: tuple[str, dict[str, Any]]) -> Prompt:
        names, kwargs = zip(*rows, strict=True)
        return Prompt(text, {"instruction_id_list": list(names), "kwargs": list(kwargs)})

    comma: tuple[str, dict[str, Any]] = ("punctuation:no_comma", {})
    many = ("length_constraints:number_words", {"relation": "at least", "num_words": 300})
    prompts = [
        prompt("kept", comma),
        prompt("too long", comma, many),
        prompt("unknown", ("detectable_format:title", {})),
    ]
    kept = list(known_prompts(prompts))
    assert kept == [Prompt("kept", {"instructions": [{"kind": "no_comma"}]})]


def test_drawn_instructions_are_about_different_things() -> None:
    group_of = {draw(random.Random(0))["kind"]: group for group, draw in DRAWS}
    rng = random.Random(1)
    for count in range(1, NUM_GROUPS + 1):
        for _ in range(50):
            drawn = draw_instructions(rng, count)
            assert len({group_of[one["kind"]] for one in drawn}) == len(drawn) == count
            assert in_words("Ask.", drawn).startswith("Ask.\n")


def test_instructions_in_words() -> None:
    one = {"kind": "sentences_at_most", "count": 1}
    two = {"kind": "avoids", "words": ["the"]}
    assert in_words("Why? ", [one, two]) == (
        'Why?\nYour answer must have at most 1 sentence. Do not use the word "the".'
    )
    assert "2 sentences." in in_words("Why?", [{**one, "count": 2}])


def write(path: Path, *rows: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    folder = tmp_path / "shared"
    folder.mkdir()
    write(folder / OPEN_ASSISTANT[0], *(f"What is {i} times {i}?" for i in range(30)))
    write(folder / OPEN_ASSISTANT[1], "x" * 500)
    row = {"key": 1, "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    write(folder / IFEVAL, {"prompt": "No commas please.", **row})
    return folder


def test_the_program_writes_prompts_that_the_reward_takes(shared: Path, tmp_path: Path) -> None:
    output = tmp_path / "data"
    build(InstructionsConfig(output_dir=str(output), shared=str(shared)))
    train = read_records(output / "prompts.jsonl", Prompt)
    held_out = read_records(output / "prompts_held_out.jsonl", Prompt)
    ifeval = read_records(output / "ifeval.jsonl", Prompt)
    questions = [{str(one.prompt).split("\n")[0] for one in part} for part in (train, held_out)]
    assert not questions[0] & questions[1]
    assert len(questions[0] | questions[1]) == 30
    assert 2 * 30 < len(train) + len(held_out) <= 3 * 30
    for part in (train, held_out, ifeval):
        shares = follows([], ["one"] * len(part), [one.meta for one in part])
        assert all(0 <= share <= 1 for share in shares)
    gold = make_gold(output / "ifeval.jsonl")
    assert gold(["No commas please."] * 2, ["a b", "a, b"]) == [1.0, 0.0]
    again = tmp_path / "again"
    build(InstructionsConfig(output_dir=str(again), shared=str(shared)))
    assert (again / "prompts.jsonl").read_bytes() == (output / "prompts.jsonl").read_bytes()


def test_settings_that_cannot_be_met_are_refused() -> None:
    with pytest.raises(ValueError, match="num_instructions is 9; give 1 to 4"):
        InstructionsConfig(output_dir="x", num_instructions=9)
    with pytest.raises(ValueError, match="num_variants is 0"):
        InstructionsConfig(output_dir="x", num_variants=0)
    with pytest.raises(ValueError, match="held_out is 1"):
        InstructionsConfig(output_dir="x", held_out=1.0)


def test_the_judge_says_which_kinds_of_instruction_were_followed(tmp_path: Path) -> None:
    instructions = [
        {"kind": "words_at_most", "count": 3},
        {"kind": "contains", "words": ["red"]},
        {"kind": "contains", "words": ["blue"]},
    ]
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"prompt": "Colours?", "meta": {"instructions": instructions}})
        + "\n"
        + json.dumps({"prompt": "Go.", "meta": {"instructions": instructions[:1]}})
        + "\n"
    )
    gold = make_gold(tmp_path / "prompts.jsonl")
    prompts, responses = ["Colours?", "Go."], ["A red one.", "I am on my way."]
    assert gold.parts(prompts, responses) == [
        {"words_at_most": 1.0, "contains": 0.5},
        {"words_at_most": 0.0},
    ]
    assert gold(prompts, responses) == [2 / 3, 0.0]


def test_rows_of_ifeval_are_kept_and_graded_as_a_task() -> None:
    rows = Dataset.from_list(
        [
            {
                "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
                "kwargs": [{"num_words": None}, {"relation": "at least", "num_words": 3}],
            },
            {
                "instruction_id_list": ["language:response_language"],
                "kwargs": [{"num_words": None}],
            },
        ]
    )
    (row,) = keep_known(rows)
    assert grade(row, ["one, two"]) == {
        "prompt_level_acc": False,
        "inst_level_acc": [False, False],
    }
    assert grade(row, ["one two three"])["prompt_level_acc"] is True
    assert mean_of_all([[True, False], [True]]) == 2 / 3
