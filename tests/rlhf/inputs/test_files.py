import gzip
import json
from pathlib import Path
from typing import Any

import datasets as hub_datasets
import huggingface_hub
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.inputs.files import NoRecordsError, read_records, split_by_prompt, write_records
from rlhf.inputs.records import Demonstration, Prompt, Ranking, Record, Text

texts = st.text(st.characters(exclude_categories=["Cs"]))
prompts = texts.filter(str.strip)
records = (
    st.builds(Demonstration, prompts, texts)
    | st.builds(
        Ranking,
        prompts,
        st.tuples(texts, texts, texts),
        st.tuples(*[st.none() | st.integers(1, 3)] * 3),
        st.none() | texts,
        st.none() | texts,
    )
    | st.builds(Prompt, prompts, st.dictionaries(texts, texts | st.integers() | st.none()))
    | st.builds(Text, prompts)
)


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(record=records, packed=st.booleans())
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_written_is_read(tmp_path: Path, record: Record, packed: bool) -> None:
    path = tmp_path / ("records.jsonl.gz" if packed else "records.jsonl")
    write_records(path, [record, record])
    assert read_records(path, type(record)) == [record, record]


def test_a_folder_is_read_file_by_file_in_the_order_of_names(tmp_path: Path) -> None:
    write_records(tmp_path / "b.jsonl", [Text("second")])
    write_records(tmp_path / "a.jsonl.gz", [Text("first")])
    (tmp_path / "notes.md").write_text("not data")
    assert read_records(tmp_path, Text) == [Text("first"), Text("second")]


def test_a_record_knows_its_file_and_row(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert [one.place for one in read_records(file, Text)] == [f"{file}, row 1", f"{file}, row 3"]


def test_limit_stops_before_later_rows_are_looked_at(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", {"text": "one"}, {"text": 2})
    assert read_records(path, Text, limit=1) == [Text("one")]


def test_byte_order_mark_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}')
    assert read_records(path, Text) == [Text("a"), Text("b")]


def test_bad_rows_are_named_by_file_and_line_and_counted(tmp_path: Path) -> None:
    good = {"prompt": "p", "responses": ["a", "b"], "ranks": [1, 2]}
    path = write_lines(tmp_path / "r.jsonl", good, *[{**good, "ranks": [1]}] * 7)
    with pytest.raises(ValueError) as raised:
        read_records(path, Ranking)
    message = str(raised.value)
    assert "7 of 8 rows do not hold a ranking" in message
    assert f"{path}, row 2: field 'ranks': found 1 ranks for 2 responses" in message
    assert "row 6" in message and "row 7" not in message and "(and 2 more)" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("e.jsonl", b"", "is empty: expected at least one text row"),
        ("e.jsonl", b"\n \n", "is empty"),
        ("e.jsonl.gz", gzip.compress(b"", mtime=0), "is empty"),
        ("n.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "row 2: field 'row': found byte 0xe9"),
        ("n.jsonl", b'{"text": "caf\xe9"}\n', "at byte 14, which is not UTF-8"),
        ("j.jsonl", b'{"text": "a"}\n{"text": ', "row 2: field 'row': found '{\"text\":'"),
        ("d.jsonl", b"[" * 100_000, "one JSON object a line"),
        ("z.jsonl.gz", b'{"text": "a"}', "is not a complete gzip file"),
        (
            "z.jsonl.gz",
            gzip.compress(b'{"text": "a"}\n' * 100, mtime=0)[:-9],
            "is not a complete gzip file",
        ),
        ("t.csv", b"text\na\n", "expected a file ending in .jsonl or .jsonl.gz"),
    ],
)
def test_a_bad_file_says_what_is_wrong(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError) as raised:
        read_records(path, Text)
    assert words in str(raised.value)
    assert str(path) in str(raised.value)


def test_a_missing_file_and_an_empty_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_records(tmp_path / "none.jsonl", Text)
    with pytest.raises(ValueError, match=r"no \.jsonl or \.jsonl\.gz file in the folder"):
        read_records(tmp_path, Text)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_records(path, [Text("old")])

    def broken() -> Any:
        yield Text("new")
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_records(path, broken())
    with pytest.raises(NoRecordsError):
        write_records(path, [])
    assert read_records(path, Text) == [Text("old")]
    assert [p.name for p in tmp_path.iterdir()] == ["t.jsonl"]


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl.gz", [Text("x")])
    write_records(tmp_path / "b.jsonl.gz", [Text("x")])
    first, second = ((tmp_path / f"{name}.jsonl.gz").read_bytes() for name in "ab")
    assert first == second
    assert first[4:8] == bytes(4), "the gzip header holds the time of writing"


def test_a_split_keeps_prompts_together_and_on_their_side() -> None:
    rows = [Demonstration(f"{i % 50}", str(i)) for i in range(200)]
    train, held_out = split_by_prompt(rows, 0.3, seed=0)
    sides = {r.key for r in train}, {r.key for r in held_out}
    assert not sides[0] & sides[1]
    assert len(train) + len(held_out) == 200
    assert 7 <= len(sides[1]) <= 23  # 15 of 50 on average

    more = [*rows, *(Demonstration(f"new {i}", "a") for i in range(50))]
    assert sides[1] <= {r.key for r in split_by_prompt(more, 0.3, seed=0)[1]}
    other_kind = [Prompt([{"role": "user", "content": f" {i} "}]) for i in range(50)]
    assert {r.key for r in split_by_prompt(other_kind, 0.3, seed=0)[1]} == sides[1]
    assert {r.key for r in split_by_prompt(rows, 0.3, seed=1)[1]} != sides[1]


def test_a_split_of_one_side_is_not_empty_under_another_salt() -> None:
    rows = [Text(str(i)) for i in range(400)]
    train, _ = split_by_prompt(rows, 0.3, seed=0, salt="files")
    _, held_out = split_by_prompt(train, 0.2, seed=0)
    assert 0.1 < len(held_out) / len(train) < 0.3


def test_a_split_with_an_empty_side_is_refused() -> None:
    rows = [Text("same")] * 10
    with pytest.raises(ValueError, match=r"held_out=0\.5 with seed=0 leaves"):
        split_by_prompt(rows, 0.5, seed=0)
    with pytest.raises(ValueError, match="held_out is 0"):
        split_by_prompt(rows, 0, seed=0)


def test_a_hub_id_names_data_set_split_and_subset(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, *, split: str) -> Any:
        asked.append((name, subset, split))
        return hub_datasets.Dataset.from_list([{"text": "from the hub"}])

    monkeypatch.setattr(hub_datasets, "load_dataset", load_dataset)
    for source in ("hub:owner/name", "hub:owner/name:test", "hub:owner/name:test:main"):
        assert read_records(source, Text) == [Text("from the hub")]
    assert asked == [
        ("owner/name", None, "train"),
        ("owner/name", None, "test"),
        ("owner/name", "main", "test"),
    ]


def test_a_hub_id_may_name_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "test.jsonl", {"text": "a"})

    def hf_hub_download(name: str, file: str, *, repo_type: str) -> str:
        assert (name, file, repo_type) == ("owner/name", "part/test.jsonl", "dataset")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    assert read_records("hub:owner/name:part/test.jsonl", Text) == [Text("a")]
