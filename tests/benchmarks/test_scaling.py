from pathlib import Path

import pytest

from benchmarks.scaling import BATCH_PANEL, PTX_PANEL, panels, plot, summarise


def points(*rows: tuple[float, float, int]) -> list[dict[str, float]]:
    return [{"x": x, "seconds": seconds, "tokens": tokens} for x, seconds, tokens in rows]


def measured() -> dict:
    return {
        panel.title: {
            name: points(*[(x, 2.0, 10) for x in xs]) for name, xs in panel.series.items()
        }
        for panel in panels()
    }


def test_summary_is_of_cost_per_token_and_of_text() -> None:
    found = measured()
    # Costs per token of 0.1, 0.1 and 0.16; their mean is 0.12.
    found[BATCH_PANEL] = {"update": points((4, 1.0, 10), (8, 2.0, 20), (16, 6.4, 40))}
    found[PTX_PANEL] = {"update": points((0, 2.0, 10), (4, 3.0, 10), (8, 5.0, 10))}
    deviation, slowdown = summarise(found).values()
    assert deviation == pytest.approx(0.16 / 0.12 - 1)
    assert slowdown == 2.5


def test_every_panel_is_plotted(tmp_path: Path) -> None:
    plot(measured(), tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 10_000
