"""Runs that are made once, and figures over seeds."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from experiments.shared import make, markdown_table, mean_cell, over_seeds, values_cell
from tests.experiments.run_folders import write_run


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a stage that only writes its folder."""

    output_dir: str
    """Folder of the run."""
    rate: float = 0.5
    """A number."""


def test_a_finished_run_is_kept_and_a_missing_or_broken_one_made(tmp_path: Path) -> None:
    config = Settings(output_dir=str(tmp_path / "run"))
    made = []

    def stage(config: Settings) -> None:
        made.append(config)
        write_run(config, {})

    write_run(config)  # as a run leaves it that was interrupted
    make(stage, config)
    make(stage, config)
    assert made == [config]


def test_a_finished_run_of_other_settings_is_neither_taken_nor_overwritten(tmp_path: Path) -> None:
    config = Settings(output_dir=str(tmp_path / "run"))
    write_run(config, {})
    with pytest.raises(ValueError, match=r"run is a finished run .*: rate is 0.5, not 0.25; move"):
        make(lambda config: pytest.fail("made anew"), replace(config, rate=0.25))


def test_figures_over_seeds_have_students_interval() -> None:
    # Mean 4, standard deviation 2: 4.3027 * 2 / sqrt(3) = 4.968.
    assert mean_cell([2.0, 4.0, 6.0], 3) == "4.000 ± 4.968"
    assert mean_cell([2.0], 1) == "2.0"
    assert values_cell([2.0, 4.0, 6.04], 1) == "2.0, 4.0, 6.0"
    figure = over_seeds([2.0, 4.0, 6.0])
    assert figure["mean"] == 4.0
    assert figure["values"] == [2.0, 4.0, 6.0]
    assert figure["interval"] == pytest.approx((-0.968, 8.968), abs=1e-3)
    assert all(map(math.isnan, over_seeds([2.0])["interval"]))


def test_markdown_table() -> None:
    assert markdown_table(["a", "b"], [["1", ""]]) == "| a | b |\n| --- | --- |\n| 1 |  |\n"
