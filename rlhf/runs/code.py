"""Identifies the code that makes a run's results, so that the run can say whether it is current."""

import ast
import functools
import hashlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.runs.folder import flat_settings

_LIBRARY = Path(__file__).parents[1]
_FUNCTION = re.compile(r"(\w+(?:\.\w+)*):\w+")
"""Matches package.module:name."""


def code_of(config: Any, settings: dict[str, Any]) -> dict[str, str]:
    """Return a hash of the program, and one of the module of each function that settings name.

    The program is the library and the folder of the module that defines its settings. Comments,
    docstrings and layout do not count, nor does what a user's module imports.

    Args:
        config: The settings object of the program.
        settings: The same settings as plain values.
    """
    module = sys.modules[type(config).__module__]
    assert module.__file__ is not None
    own = _hash_of_program(Path(module.__file__).parent)
    code = {"program": _hash_of([hash_of_library(), own])}
    for name, value in flat_settings(settings):
        match = _FUNCTION.fullmatch(value) if isinstance(value, str) else None
        if match is not None and (found := _hash_of_module(match[1])):
            code[name] = found
    return code


def hash_of_library() -> str:
    """Return the hash of rlhf. The first call takes about half a second, later ones none."""
    return _hash_of_program(_LIBRARY)


@functools.cache
def _hash_of_program(folder: Path) -> str:
    return _hash_of_folder(folder)


def _hash_of_module(name: str) -> str | None:
    """Return the hash of a module, or of all files of a package; None if it is not found.

    The loader of the function reports the error.
    """
    with suppress(Exception):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None:
            origin = Path(spec.origin)
            return (
                _hash_of_folder(origin.parent)
                if origin.stem == "__init__"
                else _hash_of_file(origin)
            )
    return None


def _hash_of_folder(folder: Path) -> str:
    files = sorted(folder.rglob("*.py"))
    return _hash_of(
        f"{file.relative_to(folder).as_posix()} {_hash_of_file(file)}" for file in files
    )


def _hash_of_file(file: Path) -> str:
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [statement for statement in node.body if not _is_docstring(statement)]
    return _hash_of([ast.dump(tree)])


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _hash_of(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()
