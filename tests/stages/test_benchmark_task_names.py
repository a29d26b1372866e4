"""An unknown name of a benchmark task is refused before the harness is imported."""

from pathlib import Path

import pytest

import stages.benchmark.task_names
from stages.benchmark.task_names import check_names


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write task files with names in all the forms that the harness's files have."""
    folder = tmp_path / "harness"
    (folder / "arc").mkdir(parents=True)
    (folder / "arc/easy.yaml").write_text("tag:\n  - ai2_arc\ntask: arc_easy\n", encoding="utf-8")
    (folder / "arc/_yaml").write_text('group: [sums-all]\n"task": "sums_en"\n', encoding="utf-8")
    (folder / "arc/utils.py").write_text("hellaswag = 1\n", encoding="utf-8")
    monkeypatch.setattr(stages.benchmark.task_names, "harness_task_folder", lambda: folder)
    return folder


def test_names_of_the_harness_are_known(harness: Path, tmp_path: Path) -> None:
    check_names(["arc_easy", "ai2_arc", "sums-all", "sums_en"], str(tmp_path))


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("arc_eazy", "did you mean arc_easy"),
        ("arc_eas", "did you mean arc_easy or arc_easier"),  # a part of a name is not a name
        ("hellaswag", "no such task; docs"),  # the code of a task is not a task
    ],
)
def test_another_name_is_refused_with_the_nearest(
    harness: Path, tmp_path: Path, name: str, meant: str
) -> None:
    (tmp_path / "arc_easier.yaml").write_text("task: arc_easier\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"^tasks.{name}: there is no ") as error:
        check_names(["arc_easy", name], str(tmp_path))
    assert meant in str(error.value)


def test_the_harness_is_not_read_for_task_files_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").write_text("task: mine\n", encoding="utf-8")
    monkeypatch.setattr(stages.benchmark.task_names, "harness_task_folder", None)
    check_names(["mine"], str(tmp_path))
    with pytest.raises(TypeError):
        check_names(["yours"], str(tmp_path))
