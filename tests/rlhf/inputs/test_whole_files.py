"""A file is the old one or the whole new one, never a part of it."""

from pathlib import Path

import pytest

from rlhf.inputs.whole_files import write_text, written_whole


def test_a_file_is_replaced_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_text(path, "old\n")
    with written_whole(path) as file:
        file.write_text("new")
        assert path.read_text() == "old\n"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_text(path, "old ä")
    with pytest.raises(KeyError), written_whole(path) as file:
        file.write_text("half of the n")
        raise KeyError
    assert path.read_text(encoding="utf-8") == "old ä"
    assert list(tmp_path.iterdir()) == [path]
