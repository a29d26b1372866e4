"""Tests figures over seeds, as tables show them."""

import math

import pytest

from experiments.shared import mean_cell, over_seeds, values_cell
from experiments.tables import markdown_table


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
