"""Start a stage, a tool or a data command by its name: `instruct-rlhf NAME [--KEY VALUE]...`.

`instruct-rlhf ppo --config FILE` is `python -m stages.ppo --config FILE`. Without a name it lists
what there is. `python -m tools` is the same command, for a checkout that is not installed.
"""

import ast
import importlib
import os
import pkgutil
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path

COMMAND = "instruct-rlhf"
GROUPS = ("stages", "tools", "data")
"""Packages whose programs are listed, in this order."""
USER_ERROR = 2
"""As in rlhf.runs.program, which is not imported: it loads torch, and a listing should be quick."""
_GUARD = 'if __name__ == "__main__":'


@dataclass(frozen=True)
class Program:
    """A program that can be started by its name."""

    name: str
    module: str
    """The module that `python -m` takes, such as stages.ppo."""
    summary: str
    """The first line of its docstring."""


def main(args: Sequence[str] | None = None) -> int:
    """Start the program that the first word names, or list all programs.

    Returns:
        The exit code. A program that ends with another one raises SystemExit.
    """
    name, *words = (sys.argv[1:] if args is None else list(args)) or ["--help"]
    if name in ("-h", "--help"):
        print(_listing(), end="")
        return 0
    if name == "--version":
        print(f"{COMMAND} {metadata.version(COMMAND)}")
        return 0
    programs = {program.name: program for group in GROUPS for program in programs_of(group)}
    if name not in programs:
        print(f"error: {_unknown(name, list(programs))}", file=sys.stderr)
        return USER_ERROR
    module = programs[name].module
    sys.argv = [module, *words]
    if os.getcwd() not in sys.path:  # as under `python -m`, so that settings can name own functions
        sys.path.insert(0, os.getcwd())
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0


def programs_of(group: str) -> Iterator[Program]:
    """Find the programs of a package without importing them.

    A package in it is a program if it has __main__.py. Outside of stages, a module is one if it can
    be started.
    """
    (folder,) = importlib.import_module(group).__path__
    for _, name, is_package in pkgutil.iter_modules([folder]):
        place = Path(folder, name)
        if is_package and (place / "__main__.py").is_file():
            yield Program(name, f"{group}.{name}", _summary(place / "__init__.py"))
        elif not is_package and group != "stages" and name != "__main__":
            source = place.with_suffix(".py")
            if _GUARD in source.read_text(encoding="utf-8"):
                yield Program(name, f"{group}.{name}", _summary(source))


def _summary(source: Path) -> str:
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _listing() -> str:
    lines = [f"usage: {COMMAND} NAME [--KEY VALUE]...", ""]
    for group in GROUPS:
        lines.append(f"{group}:")
        lines += [f"  {program.name:<14}{program.summary}" for program in programs_of(group)]
        lines.append("")
    lines.append(f"`{COMMAND} NAME --help` lists the settings of one.")
    return "\n".join(lines) + "\n"


def _unknown(name: str, known: Sequence[str]) -> str:
    nearest = get_close_matches(name, known, n=1, cutoff=0.5)
    remedy = f"did you mean {nearest[0]}?" if nearest else f"`{COMMAND}` lists all programs"
    return f"there is no program {name!r}; {remedy}"


if __name__ == "__main__":
    sys.exit(main())
