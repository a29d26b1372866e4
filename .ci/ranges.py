"""Constraints for pip that hold the packages of pyproject.toml at one end of their ranges.

`python .ci/ranges.py lowest` prints every declared lower bound as the only version, `newest`
leaves the ranges as they are. In both torch stays at the build of the environment that this runs
in: another one is gigabytes.
"""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement

KEPT = "torch"


def lowest(project: dict) -> list[str]:
    """Each requirement of the project and its extras at its lower bound, as name==version."""
    extras = project["optional-dependencies"].values()
    lines = [*project["dependencies"], *(line for extra in extras for line in extra)]
    bounds = {}
    for requirement in map(Requirement, lines):
        (bound,) = (part for part in requirement.specifier if part.operator == ">=")
        bounds[requirement.name] = bound.version
    return [f"{name}=={bound}" for name, bound in sorted(bounds.items()) if name != KEPT]


if __name__ == "__main__":
    text = Path("pyproject.toml").read_text(encoding="utf-8")
    ends = {"lowest": lowest, "newest": lambda project: []}
    pinned = ends[sys.argv[1]](tomllib.loads(text)["project"])
    print("\n".join([*pinned, f"{KEPT}=={version(KEPT)}"]))
