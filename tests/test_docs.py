"""docs/metrics.md has a row for every metric and every alarm, and none for what is not there."""

import ast
import re
from pathlib import Path

from stages.ppo.monitor import CODES

ROOT = Path(__file__).parents[1]
NAME = re.compile(r"(?:ppo|rm|sft|pretrain)/[a-z0-9_]+")
FAMILY = re.compile(r"(?:ppo|rm|sft|pretrain|seconds)/[a-z0-9_/]*NAME")


def logged_names() -> set[str]:
    """Metric names in the stages' code; those that are put together with a NAME in them."""
    names = set()
    for path in (ROOT / "stages").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= {node.value} if NAME.fullmatch(node.value) else set()
            if isinstance(node, ast.DictComp) and isinstance(node.key, ast.JoinedStr):
                names |= {spelt} if FAMILY.fullmatch(spelt := spell(node.key)) else set()
    return names


def spell(text: ast.JoinedStr) -> str:
    """An f-string with NAME for what is filled in."""
    parts = (str(part.value) if isinstance(part, ast.Constant) else "NAME" for part in text.values)
    return "".join(parts)


def documented(pattern: str) -> list[str]:
    text = (ROOT / "docs/metrics.md").read_text()
    return re.findall(rf"^\| `({pattern})` \|", text, flags=re.M)


def test_every_logged_name_has_one_row() -> None:
    rows = documented(f"{NAME.pattern}|{FAMILY.pattern}")
    assert len(rows) == len(set(rows))
    assert logged_names() == set(rows)


def test_every_alarm_has_one_row() -> None:
    assert sorted(documented(r"PPO_\w+")) == sorted(CODES)
