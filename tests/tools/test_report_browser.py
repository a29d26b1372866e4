"""The page in a real browser: it fetches nothing, obeys the keyboard and fits a telephone."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.tools.report_runs import write_pipeline, write_ppo
from tools.report.__main__ import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; Debian's package chromium has it")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed; the extra [dev] has it"
    )
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run whose samples are hostile, with a PPO stage that raised an alarm."""
    run = write_pipeline(tmp_path_factory.mktemp("report") / "run")
    write_ppo(run, alarms=[{"step": 20, "code": "PPO_KL", "message": "The KL is high."}])
    assert main([str(run)]) == 0
    return run / "report.html"


@pytest.fixture
def opened(browser: Any, path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page, with all that it asked for and complained of noted in `heard`."""
    options = getattr(request, "param", {})
    context = browser.new_context(offline=True, **options)
    page = context.new_page()
    page.heard = []
    page.on("console", lambda message: page.heard.append(message.text))
    page.on("pageerror", lambda error: page.heard.append(str(error)))
    page.on("dialog", lambda dialog: page.heard.append(dialog.message))
    page.on("request", lambda one: page.heard.append(one.url))
    page.goto(path.as_uri())
    yield page
    assert page.heard == [path.as_uri()]
    context.close()


def test_hostile_texts_do_nothing(opened: Any) -> None:
    assert opened.locator(".sample").count() == 9
    assert opened.locator(".sample img, .sample script, .sample svg").count() == 0
    assert opened.locator("html").evaluate("() => window.pwned") is None


WIDTHS = [
    {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    for width in (375, 1400)
    for scheme in ("light", "dark")
]


@pytest.mark.parametrize("opened", WIDTHS, indirect=True)
def test_nothing_is_wider_than_the_window(opened: Any) -> None:
    root = opened.locator("html")
    width = root.evaluate("one => one.clientWidth")
    assert root.evaluate("one => one.scrollWidth") <= width
    for details in opened.locator("details").all():
        details.evaluate("one => { one.open = true; }")
    assert root.evaluate("one => one.scrollWidth") <= width


def test_light_and_dark_differ(browser: Any, path: Path) -> None:
    grounds = []
    for scheme in ("light", "dark"):
        page = browser.new_page(color_scheme=scheme)
        page.goto(path.as_uri())
        grounds.append(
            page.locator("body").evaluate("one => getComputedStyle(one).backgroundColor")
        )
        page.close()
    assert grounds == ["rgb(247, 247, 245)", "rgb(20, 23, 29)"]


def test_everything_is_reached_by_keyboard(opened: Any) -> None:
    wanted = opened.locator("a, summary, input, select, svg[data-chart], .scroll")
    visible = [one for one in wanted.all() if one.is_visible()]
    seen = set()
    for _ in range(len(visible) + 5):
        opened.keyboard.press("Tab")
        seen.add(
            opened.locator("html").evaluate("() => document.activeElement.outerHTML.slice(0, 200)")
        )
    for one in visible:
        assert one.evaluate("one => one.outerHTML.slice(0, 200)") in seen


def test_arrow_keys_read_a_curve(opened: Any) -> None:
    chart = opened.locator('svg[aria-label*="KL to the reference"]')
    chart.focus()
    readout = opened.locator(f'[data-readout="{chart.get_attribute("data-chart")}"]')
    opened.keyboard.press("End")
    assert readout.inner_text() == "23: ppo_ptx 2.0909"
    opened.keyboard.press("ArrowLeft")
    assert readout.inner_text() == "22: ppo_ptx 2"


def test_the_numbers_of_a_curve_are_those_of_the_log(opened: Any) -> None:
    panel = opened.locator(".panel", has_text="KL to the reference")
    panel.locator("summary").press("Enter")
    assert panel.locator("tbody tr").count() == 24
    assert panel.locator("tbody tr").nth(1).inner_text().split() == ["1", "0.09090909090909091"]
    assert panel.locator(".alarm-note").inner_text() == "PPO_KL at update 20"


def test_samples_are_filtered_and_ordered(opened: Any) -> None:
    opened.locator("#filter").fill("JAVASCRIPT:")
    assert opened.locator(".sample:visible").count() == 1
    assert opened.locator("#shown").inner_text() == "1 of 9 prompts"
    opened.locator("#filter").fill("")
    opened.locator("#order").select_option("gold")
    assert opened.locator(".sample:visible").count() == 9


def test_it_prints(opened: Any) -> None:
    opened.emulate_media(media="print")
    assert not opened.locator("nav").is_visible()
    assert len(opened.pdf()) > 10_000
