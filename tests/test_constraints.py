"""Checks the sets of versions: what is tested, and what vLLM needs besides."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
OTHER_VERSIONS = {"numpy"}
"""Packages whose version in the tested set vLLM does not accept."""


def versions_of(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(pin.name): Version(next(iter(pin.specifier)).version) for pin in pins}


def requirements(*extras: str) -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    words = [*project["dependencies"], *(word for extra in extras for word in optional[extra])]
    return [Requirement(word) for word in words]


def test_vllm_comes_beside_the_tested_versions() -> None:
    tested, with_vllm = versions_of("constraints.txt"), versions_of("constraints-vllm.txt")
    both = tested.keys() & with_vllm.keys()
    assert {name for name in both if tested[name] != with_vllm[name]} == OTHER_VERSIONS


@pytest.mark.parametrize(
    ("name", "extras"), [("constraints.txt", ["dev"]), ("constraints-vllm.txt", ["dev", "vllm"])]
)
def test_each_set_holds_what_the_project_asks_for(name: str, extras: list[str]) -> None:
    versions = versions_of(name)
    asked = {canonicalize_name(one.name): one.specifier for one in requirements(*extras)}
    assert {name for name, range_ in asked.items() if versions[name] not in range_} == set()
