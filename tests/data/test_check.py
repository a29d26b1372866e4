import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.check import (
    CheckConfig,
    Piece,
    check,
    detect_kind,
    main,
    mark,
    render,
    statistics,
    warnings,
)
from rlhf.inputs.chat import Chat
from rlhf.inputs.records import Demonstration, Prompt, Ranking, Text
from rlhf.models.tokenizers import load_tokenizer
from tests.rlhf.tiny_models import byte_tokenizer

REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}"
    "{% endif %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
)

RANKING = {"prompt": "Name a fruit.", "responses": ["fig", "car", "fig."], "ranks": [1, 3, 1]}

SOFT = {"prompt": "Name a fruit.", "responses": ["fig", "car"], "probabilities": [[0, 1, 0.7]]}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Iterator[str]:
    """Save a tokenizer of single bytes, which gets the default chat template."""
    made = byte_tokenizer("<eos>", "<pad>", eos_token="<eos>", pad_token="<pad>")
    made.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "config.json").write_text('{"model_type": "llama"}')
    yield str(tmp_path / "tokenizer")


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (RANKING, "ranking"),
        ({"probabilities": [[0, 1, 0.5]]}, "ranking"),
        ({"prompt": "a", "response": "b"}, "demonstration"),
        ({"prompt": "a", "reponse": "b"}, "demonstration"),
        ({"promt": "a", "responses": ["b"], "ranks": [1]}, "ranking"),
        ({"prompt": "a"}, "prompt"),
        ({"prompt": "a", "meta": {}}, "prompt"),
        ({"text": "a"}, "text"),
        ({"txt": "a"}, "text"),
    ],
)
def test_the_kind_is_seen_from_the_fields(tmp_path: Path, row: Any, kind: str) -> None:
    assert detect_kind(write(tmp_path / "x.jsonl", row)) == kind


def test_ranking_figures() -> None:
    rankings = [
        Ranking("a", ("long response", "short", "mid-size"), (2, 1, None), source="x"),
        Ranking("b", ("same", "same"), (1, 1)),
        Ranking([{"role": "user", "content": "b"}], ("one", "three", "two"), (2, 1, 2)),
    ]
    lines = list(statistics(rankings, chat=None))
    assert "distinct prompts 2" in lines
    assert "turns in a prompt: 1 (3 rows)" in lines
    assert "response length in characters: min 3, median 4.5, mean 5.6, max 13" in lines
    assert "K (responses a ranking): 2 (1 rows), 3 (2 rows)" in lines
    assert "pairs 3, tied pairs 2, unranked responses 1" in lines
    assert "the longer response is the better one in 66.7% of pairs" in lines
    assert "source: none given 2, x 1" in lines


def test_soft_labels_and_weights_are_shown() -> None:
    soft = Ranking(
        "a", ("one", "three", "x"), (None,) * 3, probabilities=((0, 1, 0.25), (1, 2, 0.5))
    )
    rankings = [soft, Ranking("b", ("y", "z"), (1, None), weight=2.0)]
    lines = list(statistics(rankings, chat=None))
    assert "pairs 1, tied pairs 0, unranked responses 1" in lines
    assert (
        "pairs with a probability 2, of which even ones 1; the likelier response has 0.625 on "
        "average"
    ) in lines
    assert "weight: min 1, mean 1.5, max 2" in lines
    assert "the longer response is the better one in 100.0% of pairs" in lines
    assert mark(render(soft, chat=None), colour=False) == (
        "user: a\nassistant: \n--- response 0: [[one<end>]]\n--- response 1: [[three<end>]]"
        "\n--- response 2: [[x<end>]]\n--- response 0 is better than 1 with probability 0.25"
        "\n--- response 1 is better than 2 with probability 0.5"
    )


def test_equal_lengths_count_half_for_the_longer_response() -> None:
    lines = list(statistics([Ranking("a", ("abc", "xyz"), (1, 2))], chat=None))
    assert "the longer response is the better one in 50.0% of pairs" in lines


def test_warnings_name_what_is_rarely_meant() -> None:
    rankings = [
        Ranking("a", ("x", ""), (1, 2)),
        Ranking("a", ("x", "y"), (1, 1)),
        Ranking("b", ("x", "x"), (1, 2)),
    ]
    assert list(warnings(rankings)) == [
        "1 rows repeat earlier prompts (splits keep equal prompts together)",
        "1 of 6 responses are empty",
        "2 of 3 rankings have no pair: their responses are tied, unranked or equal",
        "1 rankings compare a response with an equal one, which training leaves out",
    ]
    assert list(warnings([Demonstration("a", "b"), Demonstration("c", "d")])) == []


def test_trained_pieces_are_marked() -> None:
    pieces = [Piece(text="Hi ", trained=False), Piece(text="there", trained=True)]
    assert mark(pieces, colour=False) == "Hi [[there]]"
    assert mark(pieces, colour=True) == "Hi \033[32mthere\033[0m"


def test_without_a_tokenizer_the_example_is_plain_text() -> None:
    demonstration = Demonstration(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": "Bye"},
        ],
        "See you.",
    )
    assert mark(render(demonstration, chat=None), colour=False) == (
        "user: Hi\nassistant: Hello.\nuser: Bye\nassistant: [[See you.<end>]]"
    )
    assert mark(render(Prompt("Hi"), chat=None), colour=False) == "user: Hi\nassistant: "
    assert mark(render(Text("Once."), chat=None), colour=False) == "[[Once.]]"


def test_the_example_is_what_the_tokenizer_makes_of_it(
    tmp_path: Path, tokenizer_dir: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "r.jsonl", RANKING, RANKING | {"prompt": "Name another."})
    check(CheckConfig(file=file, tokenizer=tokenizer_dir, example=2))
    printed = capsys.readouterr().out
    assert "2 ranking rows, all valid" in printed
    assert "response length in tokens: min 4, median 4, mean 4.3, max 5" in printed
    assert "Name another.\n\nAssistant:\n\n--- rank 1: [[fig<eos>]]\n--- rank 3: [[car" in printed
    assert "plain text" not in printed


def test_the_marked_ids_are_the_trained_ids(tokenizer_dir: str) -> None:
    chat = Chat(load_tokenizer(tokenizer_dir))
    [prompt, response] = render(Demonstration("Hi", "Hello."), chat)
    assert not prompt.trained and response.trained
    ids = chat.tokenizer(response.text, add_special_tokens=False).input_ids
    assert ids == chat.response_ids("Hello.")
    ids = chat.tokenizer(prompt.text, add_special_tokens=False).input_ids
    assert ids == chat.prompt_ids("Hi")


@pytest.mark.parametrize(
    ("rows", "settings", "words"),
    [
        ([], {}, "is empty"),
        ([{"prompt": "a", "reponse": "b"}], {}, "did you mean 'response'?"),
        ([RANKING | {"ranks": [1, 2]}], {}, "row 1: field 'ranks': found 2 ranks for 3 responses"),
        ([{"prompt": "a", "responses": ["b"], "ranks": [1]}], {}, "found 1 (K = 1)"),
        ([RANKING | {"ranks": [1, 1, 1]}] * 2, {}, "in all 2 rankings every response is tied"),
        ([RANKING | {"ranks": [1, None, None]}], {}, "tied or unranked"),
        ([SOFT | {"probabilities": [[0, 1, 0.5]]}], {}, "a probability other than 0.5"),
        ([RANKING | {"responses": ["a", "a", "a"]}], {}, "or is preferred to the same text"),
        ([{"messages": [{"role": "user", "content": "a"}]}], {}, "--format messages"),
        ([RANKING], {"kind": "text"}, "row 1: field 'prompt': found an unknown field"),
        ([RANKING], {"example": 2}, "example is 2; the file has rows 1 to 1"),
        ([RANKING], {"tokenizer": "./none"}, "./none does not exist"),
    ],
)
def test_bad_files_are_refused(
    tmp_path: Path, rows: list[Any], settings: dict[str, Any], words: str
) -> None:
    file = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises((ValueError, OSError)) as raised:
        check(CheckConfig(file=file, **settings))
    assert words in str(raised.value)


def test_a_row_that_the_template_refuses_is_named(tmp_path: Path, tokenizer_dir: str) -> None:
    template = Path(tokenizer_dir) / "chat_template.jinja"
    template.write_text(REFUSES_SYSTEM)
    system = {"role": "system", "content": "Be brief."}
    asked = [system, {"role": "user", "content": "Hi"}]
    for row, prompt in (
        (RANKING, asked),
        ({"prompt": "a", "response": "b"}, asked),
        ({"prompt": "a"}, asked),
    ):
        file = write(tmp_path / "x.jsonl", row, row, row | {"prompt": prompt})
        with pytest.raises(ValueError, match=r"x\.jsonl, row 3: the chat template refuses"):
            check(CheckConfig(file=file, tokenizer=tokenizer_dir))


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.slow
def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path, encoding: str) -> None:
    file = write(tmp_path / "x.jsonl", {"prompt": "\U0001f600 \u4f60", "response": "\ud83d\ude00"})
    done = subprocess.run(
        [sys.executable, "-m", "data.check", file],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"user: \\U0001f600 \\u4f60" in done.stdout


def test_the_file_needs_no_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "x.jsonl", RANKING, RANKING | {"prompt": "b", "ranks": [1, 1, 1]})
    main([file, "--kind", "ranking"])
    printed = capsys.readouterr().out
    assert "1 of 2 rankings have no pair" in printed
    assert "[[fig<end>]]" in printed


@pytest.mark.slow
def test_the_command_ends_with_a_message_and_no_traceback(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"text": "caf\xe9"}\n')
    done = subprocess.run(
        [sys.executable, "-m", "data.check", str(file)], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    assert f"{file}, row 1: field 'row': found byte 0xe9 at byte 14" in done.stderr
