"""Text is UTF-8 in any locale: in every call of the project, and in a program's run."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("rlhf", "stages", "data", "tools", "experiments", "benchmarks", "examples", ".ci")
FILES = ("open", "read_text", "write_text", "NamedTemporaryFile", "TemporaryFile")
OPENERS = (*FILES, "fdopen", "makefile")
STARTERS = ("run", "Popen", "check_output")
NARROW = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
"""A locale of ASCII. Python would use UTF-8 in it unless forbidden."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_text_file_is_opened_as_utf8(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*") if is_python(path)]
    assert paths
    places = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in paths
        for line in lines_in_locale(path.read_text(encoding="utf-8"))
    ]
    assert not places, 'give encoding="utf-8"'


def is_python(path: Path) -> bool:
    if not path.is_file() or "__pycache__" in path.parts:
        return False
    return path.suffix == ".py" or path.read_bytes().startswith(b"#!/usr/bin/env python")


def lines_in_locale(source: str) -> Iterator[int]:
    """Return the lines of calls that read or write text in the locale's encoding."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        if isinstance(call.func, ast.Name) and name == "write_text":
            continue  # our own function writes UTF-8
        keywords = {keyword.arg for keyword in call.keywords}
        is_os = ast.unparse(call.func) == "os.open"  # returns a descriptor
        mode = [one.value for one in call.args if isinstance(one, ast.Constant)]
        is_binary = any(isinstance(one, str) and "b" in one and len(one) < 4 for one in mode)
        opens = name in OPENERS and not is_binary and not is_os
        starts = name in STARTERS and keywords & {"text", "universal_newlines"}
        if (opens or starts) and "encoding" not in keywords:
            yield call.lineno


def test_calls_in_the_locales_encoding_are_found() -> None:
    source = (
        'open(p)\np.read_text()\np.open("wb")\nopen(p, encoding="utf-8")\n'
        "subprocess.run([], text=True)\nsubprocess.run([])\nos.open(p, 0)\n"
    )
    assert sorted(lines_in_locale(source)) == [1, 2, 5]


def test_settings_are_utf8_in_any_locale(tmp_path: Path) -> None:
    """In a locale of ASCII the settings' characters reach the program unchanged."""
    row = {"question é": "Où ?", "answer": "Là."}
    (tmp_path / "in.jsonl").write_text(json.dumps(row), encoding="utf-8")
    settings = f"prompt_column: question é\nresponse_column: answer\ninput: {tmp_path}/in.jsonl\n"
    (tmp_path / "settings.yaml").write_text(settings, encoding="utf-8")
    words = ["--config", str(tmp_path / "settings.yaml"), "--format", "columns"]
    run = subprocess.run(
        [sys.executable, "-m", "data.convert", *words, "--output", str(tmp_path / "out.jsonl")],
        env={**os.environ, **NARROW},
        cwd=ROOT,
        capture_output=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stderr
    assert "Où ?" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
