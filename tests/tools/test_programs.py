"""One command starts every stage, tool and data command by its name."""

import subprocess
import sys
from pathlib import Path

import pytest

from tools.__main__ import GROUPS, main, programs_of

ROOT = Path(__file__).parents[2]


def test_every_stage_tool_and_data_command_is_listed_with_a_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    packages = [
        path.parent.name for group in GROUPS for path in ROOT.glob(f"{group}/*/__main__.py")
    ]
    assert {*packages, "doctor", "plan", "export", "check", "smollm2"} <= set(names)
    assert {"stage_server", "stage_client", "__main__"}.isdisjoint(names)
    assert len(names) == len(set(names))
    assert all(len(line.split()) > 3 for line in lines if line.startswith("  "))


def test_a_program_is_found_in_its_package_and_a_helper_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "group"
    (group / "folder").mkdir(parents=True)
    (group / "__init__.py").touch()
    (group / "folder" / "__init__.py").write_text('"""Count folders.\n\nIn full."""')
    (group / "folder" / "__main__.py").touch()
    (group / "alone.py").write_text('"""Count files."""\nif __name__ == "__main__":\n    1\n')
    (group / "helper.py").write_text('"""Help."""\n')
    monkeypatch.syspath_prepend(tmp_path)
    found = [(one.name, one.module, one.summary) for one in programs_of("group")]
    assert found == [
        ("alone", "group.alone", "Count files."),
        ("folder", "group.folder", "Count folders."),
    ]


def test_an_unknown_name_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evalute", "--config", "x.yaml"]) == 2
    message = capsys.readouterr().err
    assert message == "error: there is no program 'evalute'; did you mean evaluate?\n"
    assert main(["qqqq"]) == 2
    assert capsys.readouterr().err.endswith("`instruct-rlhf` lists all programs\n")


@pytest.mark.slow
def test_a_program_gets_its_words_and_gives_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "Hi", "response": 3}\n')

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *words, "rows.jsonl"]
        environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    by_name, by_module = run("-m", "tools", "check"), run("-m", "data.check")
    assert by_name.returncode == by_module.returncode == 2
    assert by_name.stdout + by_name.stderr == by_module.stdout + by_module.stderr
    assert "rows.jsonl" in by_name.stdout + by_name.stderr
