"""Tests the page in a real browser: it fetches nothing, obeys the keyboard and fits a phone.

axe-core looks for barriers: missing names, headings out of order, text that is too faint.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tools.report_runs import write_pipeline, write_ppo
from tools.report.__main__ import main
from tools.report.charts import NUM_COLOURS

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed; the extra [dev] has it"
)
# The page handles a key press after `press` has returned; `expect` waits for that.
expect = sync_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; Debian's package chromium has it")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a run with hostile samples and an alarm in its PPO stage."""
    run = write_pipeline(tmp_path_factory.mktemp("report") / "run")
    write_ppo(run, alarms=[{"step": 20, "code": "PPO_KL", "message": "The KL is high."}])
    assert main([str(run)]) == 0
    return run / "report.html"


def listen(page: Any) -> list[str]:
    """Record what a page requests and which errors it reports, from now on."""
    heard: list[str] = []
    page.on("console", lambda message: heard.append(message.text))
    page.on("pageerror", lambda error: heard.append(str(error)))
    page.on("dialog", lambda dialog: heard.append(dialog.message))
    page.on("request", lambda one: heard.append(one.url))
    return heard


@pytest.fixture
def opened(browser: Any, path: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Open the page; record its requests and errors in `heard`."""
    options = getattr(request, "param", {})
    context = browser.new_context(offline=True, **options)
    page = context.new_page()
    page.heard = listen(page)
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


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write pages that together show all that a page may show."""
    base = tmp_path_factory.mktemp("kinds")
    high = {"code": "PPO_KL", "message": "The KL is high."}
    warning = {"code": "EVAL_LENGTH", "policy": "ppo_ptx", "message": "Length alone."}
    run = write_pipeline(base / "run", warnings=[warning])
    write_ppo(run, alarms=[{"step": 20, **high}])
    other = write_pipeline(base / "other")
    write_ppo(other, kl_coef=0.1)
    dead = write_ppo(base / "dead", last_update=7, alarms=[{"step": 7, **high}])
    for folders in ([run], [run, other], [dead]):
        assert main([str(folder) for folder in folders]) == 0
    return {
        "a run with warnings": run / "report.html",
        "two runs": run / "report_vs_other.html",
        "a dead run": dead / "report.html",
    }


def test_every_kind_of_page_is_quiet(browser: Any, kinds: dict[str, Path]) -> None:
    for path in kinds.values():
        page = browser.new_page(offline=True)
        heard = listen(page)
        page.goto(path.as_uri())
        page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
        page.locator("[data-table] table").first.wait_for()
        page.close()
        assert heard == [path.as_uri()]


def faults_of(page: Any) -> list[str]:
    """Return what axe-core finds in a page with all its parts unfolded; doubtful cases count too.

    It cannot measure contrast within drawings, which test_drawings_are_clear does.
    """
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright",
        reason="axe-playwright-python is not installed; the extra [dev] has it",
    )
    page.locator("details").evaluate_all("all => all.forEach((one) => { one.open = true; })")
    page.locator("[data-table] table").first.wait_for()  # the script fills tables when they open
    found = axe.Axe().run(page, context={"exclude": ["svg *"]}).response
    return [
        f"{fault['id']}: {fault['help']}: {place['html'][:200]}"
        for sort in ("violations", "incomplete")
        for fault in found[sort]
        for place in fault["nodes"]
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    ["a run with warnings", pytest.param("two runs", marks=pytest.mark.long), "a dead run"],
)
def test_axe_finds_no_fault(browser: Any, kinds: dict[str, Path], kind: str) -> None:
    for options in (WIDTHS[0], WIDTHS[-1]):  # each width and each scheme once
        # The page's own policy would keep axe-core out, as it keeps all other scripts out.
        context = browser.new_context(bypass_csp=True, **options)
        page = context.new_page()
        page.goto(kinds[kind].as_uri())
        assert faults_of(page) == [], options
        context.close()


@pytest.mark.slow
def test_axe_finds_a_fault(browser: Any, kinds: dict[str, Path], tmp_path: Path) -> None:
    text = kinds["a dead run"].read_text(encoding="utf-8")
    (tmp_path / "page.html").write_text(text.replace('<html lang="en">', "<html>"), "utf-8")
    context = browser.new_context(bypass_csp=True)
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    (fault,) = faults_of(page)
    assert fault.startswith("html-has-lang")
    context.close()


def luminance(colour: Sequence[float]) -> float:
    """Return the relative luminance (WCAG 2.2) of an sRGB colour with channels from 0 to 255."""
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4
        for share in (channel / 255 for channel in colour)
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(colour: Sequence[float], ground: Sequence[float], opacity: float = 1.0) -> float:
    """Return the contrast ratio (WCAG 2.2), from 1 to 21."""
    mixed = [opacity * a + (1 - opacity) * b for a, b in zip(colour, ground, strict=True)]
    low, high = sorted((luminance(mixed), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def channels(colour: str) -> list[float]:
    """Return the channels of a colour that a browser computed: `rgb(1, 2, 3)`."""
    return [float(one) for one in colour.removeprefix("rgb(").removesuffix(")").split(",")]


def test_contrast_is_that_of_wcag() -> None:
    assert contrast([0, 0, 0], [255, 255, 255]) == pytest.approx(21)
    assert contrast([255, 0, 0], [255, 255, 255]) == pytest.approx(1.05 / (0.2126 + 0.05))
    assert contrast([0, 0, 0], [255, 255, 255], opacity=0.0) == pytest.approx(1)


TEXT, LINE = 4.5, 3.0
"""Least contrast of text (WCAG 1.4.3) and of other things that a reader must see (1.4.11)."""
DRAWN = [
    ("figure text", "fill", "figure", TEXT),
    (".box + text", "fill", ".box", TEXT),
    (".curve:not(.raw)", "stroke", "figure", LINE),
    (".curve:not(.raw)", "stroke", ".band", LINE),
    (".alarm", "fill", "figure", LINE),
    (".alarm-line", "stroke", ".band", LINE),
    (".limit", "stroke", "figure", LINE),
    (".whisker", "stroke", "figure", LINE),
    (".thin", "stroke", "figure", LINE),
    (".dot", "fill", "figure", LINE),
    (".edge", "stroke", "body", LINE),
]
"""What is drawn, by which property, on which background, and its least contrast."""


def styles_of(page: Any, selector: str, *names: str) -> set[tuple[str, ...]]:
    """Return the different values that elements have of some properties."""
    read = "(all, names) => all.map((one) => names.map((name) => getComputedStyle(one)[name]))"
    return {tuple(of) for of in page.locator(selector).evaluate_all(read, list(names))}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_drawings_are_clear(browser: Any, kinds: dict[str, Path], scheme: str) -> None:
    page = browser.new_page(color_scheme=scheme)
    page.goto(kinds["two runs"].as_uri())
    ((card,),) = styles_of(page, "figure", "backgroundColor")
    for number in range(NUM_COLOURS):  # also those of which this page has no line
        read = f"one => getComputedStyle(one).getPropertyValue('--c{number}')"
        line = bytes.fromhex(page.locator("html").evaluate(read).strip("# "))
        assert contrast(line, channels(card)) >= LINE, number
    for mark, name, below, least in DRAWN:
        ground = "fill" if below in (".band", ".box") else "backgroundColor"
        ((behind,),) = styles_of(page, below, ground)
        drawn = styles_of(page, mark, name, "opacity")
        assert drawn, mark
        for colour, opacity in drawn:
            reached = contrast(channels(colour), channels(behind), float(opacity))
            assert reached >= least, (mark, colour, below)
    page.close()


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
    expect(readout).to_have_text("23: ppo_ptx 2.0909")
    last_point = str(chart.locator("polyline").get_attribute("points")).split()[-1]
    assert (
        chart.locator(".cursor").get_attribute("x1")
        == last_point.split(",")[0].removesuffix(".0")
        == "324"
    )
    opened.keyboard.press("ArrowLeft")
    expect(readout).to_have_text("22: ppo_ptx 2")


def test_the_numbers_of_a_curve_are_those_of_the_log(opened: Any) -> None:
    panel = opened.locator(".panel", has_text="KL to the reference")
    panel.locator("summary").press("Enter")
    expect(panel.locator("tbody tr")).to_have_count(24)
    second = panel.locator("tbody tr").nth(1).locator("th, td")
    expect(second).to_have_text(["1", "0.09090909090909091"])
    expect(panel.locator(".alarm-note")).to_have_text("PPO_KL at update 20")


def test_samples_are_filtered_and_ordered(opened: Any) -> None:
    opened.locator("#filter").fill("JAVASCRIPT:")
    expect(opened.locator(".sample:visible")).to_have_count(1)
    expect(opened.locator("#shown")).to_have_text("1 of 9 prompts")
    opened.locator("#filter").fill("")
    opened.locator("#order").select_option("gold")
    expect(opened.locator(".sample:visible")).to_have_count(9)


MARK_CORNERS = """(all) => all.forEach((svg, number) => {
  const { x, y, width, height } = svg.viewBox.baseVal;
  for (const [name, left, top, anchor] of [
    ["upper", x, y + 12, "start"], ["lower", x + width, y + height - 2, "end"],
  ]) {
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "text");
    mark.setAttribute("x", left);
    mark.setAttribute("y", top);
    mark.setAttribute("text-anchor", anchor);
    mark.textContent = `${name}${number}x`;
    svg.append(mark);
  }
  svg.closest("figure")?.querySelector("figcaption").append(`title${number}x`);
})"""
"""JavaScript that writes a word into two opposite corners of every drawing and its caption."""


@pytest.mark.parametrize(
    "opened", [{"color_scheme": scheme} for scheme in ("light", "dark")], indirect=True
)
def test_no_drawing_is_cut_in_print(opened: Any) -> None:
    pdfium = pytest.importorskip(
        "pypdfium2", reason="pypdfium2 is not installed; the extra [dev] has it"
    )
    opened.locator("#curves details").evaluate_all("all => all.forEach((one) => one.open = true)")
    expect(opened.locator("details[data-table] table")).to_have_count(
        opened.locator("details[data-table]").count()
    )
    drawings = opened.locator("svg")
    opened.emulate_media(media="print")
    seen = [number for number, one in enumerate(drawings.all()) if one.is_visible()]
    assert len(seen) == drawings.count() > 10
    drawings.evaluate_all(MARK_CORNERS)
    places: dict[str, dict[str, int]] = {}
    document = pdfium.PdfDocument(opened.pdf())
    for page_number, page in enumerate(document):
        text = page.get_textpage()
        width, height = page.get_size()
        found = re.finditer(r"(title|upper|lower)(\d+)x", text.get_text_range())
        for match in found:
            boxes = [text.get_charbox(place) for place in range(*match.span())]
            left, bottom, right, top = zip(*boxes, strict=True)
            assert min(left) >= 0 and max(right) <= width, match[0]
            assert min(bottom) >= 0 and max(top) <= height, match[0]
            places.setdefault(match[2], {})[match[1]] = page_number
    assert places.keys() == {str(number) for number in seen}
    for number, sheets in places.items():
        assert sheets.keys() >= {"upper", "lower"} and len({*sheets.values()}) == 1, number


def test_print_is_dark_on_white(opened: Any) -> None:
    opened.emulate_media(media="print", color_scheme="dark")
    expect(opened.locator("nav")).to_be_hidden()
    body = opened.locator("body")
    ink, ground = (
        channels(body.evaluate(f"one => getComputedStyle(one).{name}"))
        for name in ("color", "backgroundColor")
    )
    assert ground == [255, 255, 255] and contrast(ink, ground) > 7
