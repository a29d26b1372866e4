"""Links to files and headings, places in the code and the map of the rooms are right."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "EXPERIMENTS.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
EXTERNAL = ("http://", "https://", "mailto:")
HEADS = ["Question", "Command", "Result", "Reading", "Limits"]
LONGEST_LINE = 140


def prose_of(path: Path) -> str:
    """Return the page without its blocks of code and its code within lines."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    return re.sub(r"`[^`\n]*`", "", text)


@cache
def anchors_of(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(path: Path) -> list[str]:
    broken = []
    for link in LINK.findall(prose_of(path)):
        if link.startswith(EXTERNAL):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        leads_out = not target.is_relative_to(ROOT)
        if leads_out or not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_every_anchor_to_a_heading(path: Path) -> None:
    assert broken_links(path) == []


def test_links_that_lead_nowhere_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A head, with `code`\n[a](#a-head-with-code) [b](page.md#a-head-with-code) [c](gone.md)\n"
        "[d](#b) [e](https://example.org) `[f](code.md)` [g](../outside.md)\n"
    )
    assert broken_links(page) == ["gone.md", "#b", "../outside.md"]


def test_every_page_of_docs_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached:
            continue
        reached.add(page)
        links = (link.partition("#")[0] for link in LINK.findall(prose_of(page)))
        targets = ((page.parent / link).resolve() for link in links if link.endswith(".md"))
        waiting += [target for target in targets if target.is_file()]
    assert set(PAGES) <= reached


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_lines_are_short_but_for_rows_of_tables(path: Path) -> None:
    text, *_ = path.read_text(encoding="utf-8").partition("<!-- The rest of this page is written")
    # Results in the README are pasted as they were measured.
    lines = re.sub(r"^## What comes out\n.*?(?=^## )", "", text, flags=re.M | re.S).splitlines()
    long = [line for line in lines if len(line) > LONGEST_LINE and not line.startswith(("|", "!"))]
    assert long == []


def test_the_index_of_experiments_has_a_row_for_every_page() -> None:
    index = (ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    assert len(index.splitlines()) <= 60
    rows = re.findall(r"^\| (\d{4}-\d\d-\d\d) \|.*?\((docs/experiments/\S+?\.md)\)", index, re.M)
    pages = sorted(path for path in PAGES if path.parent.name == "experiments")
    assert sorted(ROOT / name for _, name in rows) == pages
    assert all(Path(name).name.startswith(date) for date, name in rows)
    dates = [date for date, _ in rows]
    assert dates == sorted(dates, reverse=True)


def test_every_experiment_has_the_five_heads() -> None:
    for path in (ROOT / "docs/experiments").glob("*.md"):
        heads = re.findall(r"^## (.+)$", path.read_text(encoding="utf-8"), flags=re.M)
        assert heads == HEADS, path.name


def test_places_in_the_recipe_exist() -> None:
    """`file.py:name` must be a function or class of that file; a file alone must exist."""
    text = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    places = re.findall(r"`([\w/]+\.py)(?::(\w+))?`", text)
    assert len(places) > 20
    for file, name in places:
        body = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not name or name in defined, f"{file} has no {name}"


def test_comments_name_mistakes_that_the_recipe_has() -> None:
    text = (ROOT / "docs/recipe.md").read_text(encoding="utf-8")
    known = re.findall(r"^(\d+)\. \*\*", text, flags=re.M)
    assert known == [str(number) for number in range(1, len(known) + 1)]
    sources = [path for top in ("rlhf", "stages") for path in (ROOT / top).rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    named = re.findall(r"docs/recipe\.md,\s+mistake (\d+)", code)
    assert named and set(named) <= set(known)
    assert "recipe: checklist" not in code


def test_the_map_has_every_file_once() -> None:
    """docs/architecture.md has each file of rlhf/, stages/, tools/ and data/ once."""
    shown, folder = [], ""
    for line in (ROOT / "docs/architecture.md").read_text(encoding="utf-8").splitlines():
        if heading := re.match(r"#+ ([\w/]+):", line):
            folder = heading[1]
        if row := re.match(r"\| `(\w+\.py)` \| .", line):
            shown.append(f"{folder}/{row[1]}")
    files = [
        path for top in ("rlhf", "stages", "tools", "data") for path in ROOT.glob(f"{top}/**/*.py")
    ]
    there = {path.relative_to(ROOT).as_posix() for path in files if not path.stem.startswith("__")}
    assert sorted(shown) == sorted(there)


def test_pages_that_the_code_names_exist() -> None:
    folders = ("rlhf", "stages", "tools", "data", "experiments", "benchmarks", "configs")
    sources = [path for top in folders for path in (ROOT / top).rglob("*")]
    texts = [path.read_text("utf-8") for path in sources if path.suffix in (".py", ".yaml")]
    named = {name for text in texts for name in re.findall(r"docs/[\w/]+\.md", text)}
    assert named
    assert [name for name in named if not (ROOT / name).is_file()] == []
