"""The docstring of a wing is the map of its files, and importing it does nothing else."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WINGS = sorted(path.parent for path in (ROOT / "rlhf").glob("*/__init__.py"))


@pytest.mark.parametrize("wing", WINGS, ids=lambda wing: wing.name)
def test_a_wing_is_the_map_of_its_files(wing: Path) -> None:
    tree = ast.parse((wing / "__init__.py").read_text(encoding="utf-8"))
    text = ast.get_docstring(tree, clean=False)
    assert text is not None and len(tree.body) == 1
    named = re.findall(r"^ *(\w+\.py) ", text, flags=re.M)
    assert sorted(named) == sorted({path.name for path in wing.glob("*.py")} - {"__init__.py"})


def test_no_file_lies_loose_beside_the_wings() -> None:
    assert [path.name for path in (ROOT / "rlhf").glob("*.py")] == ["__init__.py"]
    assert len(WINGS) == 8


@pytest.mark.parametrize("wing", ["models", "training"])
def test_only_compat_reaches_into_other_libraries(wing: str) -> None:
    """Only compat.py uses private attributes of other libraries' objects."""
    found = [
        f"{path.name}:{node.lineno} {ast.unparse(node)}"
        for path in (ROOT / "rlhf" / wing).glob("*.py")
        if path.name != "compat.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute)
        and re.match(r"_[a-z]", node.attr)
        and ast.unparse(node.value) not in ("self", "super()")
    ]
    assert found == []
