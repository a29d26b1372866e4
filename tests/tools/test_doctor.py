"""Tests the doctor's report on simulated installations that lack something."""

import importlib.util
import py_compile
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from packaging.requirements import Requirement

import rlhf.runs.stopwatch
import rlhf.runs.trackers  # otherwise first imported while packages are hidden
from tests import guarded_chain
from tools import doctor
from tools.doctor import Finding

WHOLE = "the base is whole"
BROKEN = "the base is not whole: fix what says FAIL"
ALL_REDUCE, DEEPSPEED = doctor._ALL_REDUCE, doctor.deepspeed


def nothing() -> list[Finding]:
    return []


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the checks fast: no processes, no DeepSpeed, and no other machine."""

    def refuse(*args: Any) -> NoReturn:
        raise AssertionError(f"asked {args}")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr(doctor, "_ALL_REDUCE", "")
    monkeypatch.setattr(doctor, "deepspeed", nothing)


def declare(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    """Make the base need only these packages, as others would be imported while some are hidden."""
    declared = doctor._declared
    monkeypatch.setattr(
        doctor, "_declared", lambda extra: declared(extra) if extra else [*map(Requirement, lines)]
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Return a mapping of packages to simulated versions to fill. None means not installed."""
    versions: dict[str, str | None] = {}
    real = metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return versions


def report(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[str]]:
    """Return the exit code and the lines of `python -m tools.doctor`."""
    code = doctor.main([])
    return code, capsys.readouterr().out.splitlines()


def line_of(lines: list[str], name: str) -> str:
    (line,) = (line for line in lines if line[6:].startswith(f"{name}: "))
    return line


def test_a_whole_base_is_told_with_its_versions(capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = report(capsys)
    assert code == 0
    assert lines[-1] == WHOLE
    assert not [line for line in lines if line.startswith("FAIL")]
    assert line_of(lines, "torch") == f"OK    torch: {torch.__version__}"
    for name in "python pyyaml jsonargparse trl memory disk".split():
        assert line_of(lines, name).startswith("OK    ")
    assert line_of(lines, "two processes") == "OK    two processes: joined over gloo"
    assert line_of(lines, "sdpa with a packing mask").endswith(": right")
    assert "GFLOPs a second" in line_of(lines, "bfloat16")


@pytest.mark.parametrize(
    ("is_forbidden", "is_compiled", "is_slow"),
    [(True, False, True), (True, True, False), (False, False, False)],
)
def test_packages_that_every_start_compiles_anew_are_told(
    is_forbidden: bool,
    is_compiled: bool,
    is_slow: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "torch.py").touch()
    if is_compiled:
        py_compile.compile(str(tmp_path / "torch.py"))
    spec = importlib.util.spec_from_file_location("torch", tmp_path / "torch.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", is_forbidden)
    (found,) = doctor.findings_of(doctor.bytecode)
    assert str(found).endswith("; unset PYTHONDONTWRITEBYTECODE") == is_slow
    assert not found.is_needed


@pytest.mark.parametrize(
    ("name", "version", "line"),
    [
        ("peft", None, 'peft: not installed; pip install "peft<1,>=0.21"'),
        ("trl", "0.9.6", 'trl: 0.9.6, expected <2,>=1.16; pip install "trl<2,>=1.16"'),
        ("pyyaml", None, 'pyyaml: not installed; pip install "pyyaml>=6.0.1"'),
        (
            "jsonargparse",
            None,
            'jsonargparse: not installed; pip install "jsonargparse[signatures]<5,>=4.51"',
        ),
    ],
)
def test_what_the_base_lacks_fails_with_its_pip_line(
    name: str,
    version: str | None,
    line: str,
    installed: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    installed[name] = version
    for slow in ("hardware", "attention", "processes"):
        monkeypatch.setattr(doctor, slow, nothing)
    code, lines = report(capsys)
    assert code == 1
    assert [line for line in lines if line.startswith("FAIL")] == [f"FAIL  {line}"]
    assert lines[-1] == BROKEN


def test_a_package_that_does_not_import_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declare(monkeypatch, "pyyaml>=6.0.1")
    monkeypatch.setitem(sys.modules, "yaml", None)
    code, lines = report(capsys)
    found = line_of(lines, "pyyaml")
    assert found.startswith(f"FAIL  pyyaml: {metadata.version('pyyaml')}, ModuleNotFoundError: ")
    assert found.endswith('; pip install --force-reinstall "pyyaml>=6.0.1"')
    assert (code, lines[-1]) == (1, BROKEN)


def test_without_torch_the_report_gets_to_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declare(monkeypatch, "torch>=2.11,<3")
    monkeypatch.setitem(sys.modules, "torch", None)
    code, lines = report(capsys)
    assert (code, lines[-1]) == (1, BROKEN)
    assert line_of(lines, "torch").endswith('; pip install --force-reinstall "torch<3,>=2.11"')
    assert line_of(lines, "disk").startswith("OK    ")


def test_what_is_declared_is_read_from_the_installed_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = [
        "torch<3,>=2.11",
        'windowed>=1; sys_platform == "win32"',
        'deepspeed>=0.19; extra == "deepspeed"',
        'deepspeed>=0.20; sys_platform == "linux" and extra == "dev"',
    ]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr(sys, "platform", "linux")
    assert [str(one) for one in doctor._declared("")] == ["torch<3,>=2.11"]
    assert [str(one) for one in doctor._declared("deepspeed")] == ["deepspeed>=0.19"]
    assert doctor._declared("vllm") == []


def test_without_an_installed_package_the_remedy_installs_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "PACKAGE", "instruct-rlhf-that-nobody-installed")
    code, lines = report(capsys)
    assert code == 1
    assert line_of(lines, "base").startswith("FAIL  base: PackageNotFoundError: ")
    assert line_of(lines, "base").endswith("; " + doctor.REINSTALL)


def test_packages_that_only_some_settings_need_are_not_failures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    declare(monkeypatch)
    finders = [guarded_chain.WithoutHidden(finder, set()) for finder in sys.meta_path]
    monkeypatch.setattr(sys, "meta_path", finders)
    code, lines = report(capsys)
    assert (code, lines[-1]) == (0, WHOLE)
    for name, purpose, bound in (
        ("deepspeed", "ZeRO", ">=0.19"),
        ("tensorboard", "trackers", ">=2.18"),
        ("wandb", "trackers", ">=0.20"),
        ("trackio", "trackers", ">=0.43"),
        ("bitsandbytes", "QLoRA", ">=0.46.1"),
        ("vllm", "faster sampling, on GPUs", ">=0.22"),
    ):
        expected = f'no    {name} ({purpose}): not installed; pip install "{name}{bound}"'
        assert line_of(lines, f"{name} ({purpose})") == expected
    assert not [line for line in lines if "W&B" in line]
    assert not findings(DEEPSPEED)


def findings(check: Any) -> dict[str, Finding]:
    return {finding.name: finding for finding in check()}


def test_a_deepspeed_that_does_not_import_is_told(
    installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["deepspeed"] = "0.19.1"
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    found = findings(DEEPSPEED)["DeepSpeed"]
    assert found.detail.startswith("ModuleNotFoundError: ")
    assert found.remedy == "pip install --force-reinstall deepspeed"
    assert not found.is_needed


def test_offloading_needs_a_compiler(
    installed: dict[str, str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    installed["deepspeed"] = "0.19.1"
    monkeypatch.setattr(importlib, "import_module", lambda name: None)
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "clang++" else tool)
    found = findings(DEEPSPEED)["DeepSpeed's offloading"]
    assert found.detail == "clang++ missing"
    assert found.remedy == "install what is missing, or leave offloading off"


@pytest.mark.slow
def test_two_processes_join(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ALL_REDUCE", ALL_REDUCE)
    assert findings(doctor.processes)["two processes"].remedy is None


@pytest.mark.parametrize(
    ("program", "why"),
    [
        ("raise OSError('no route')", "OSError: no route"),
        ("import sys; sys.exit(1)", "their sum is wrong"),
        ("import time; time.sleep(60)", "no answer within 1 seconds"),
    ],
)
def test_processes_that_do_not_join_are_told_and_ended(
    program: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[subprocess.Popen[str]] = []
    start = subprocess.Popen

    def noted(*args: Any, **options: Any) -> subprocess.Popen[str]:
        started.append(start(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", noted)
    monkeypatch.setattr(doctor, "_ALL_REDUCE", program)
    monkeypatch.setattr(doctor, "GLOO_SECONDS", 1 if "sleep" in program else 60)
    found = findings(doctor.processes)["two processes"]
    assert found.detail == f"did not join over gloo, {why}"
    assert found.remedy == "run on one process"
    assert [one.poll() is not None for one in started] == [True, True]


def test_a_wrong_attention_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda query, key, value, attn_mask: value.cumsum(2),
    )
    found = findings(doctor.attention)["sdpa with a packing mask"]
    assert (found.detail, found.is_needed) == ("wrong", True)
    assert found.remedy == "pip install --force-reinstall torch"


@pytest.mark.parametrize(("key", "remedy"), [("k", None), ("", "wandb login")])
def test_logins(
    key: str,
    remedy: str | None,
    installed: dict[str, str | None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    installed["wandb"] = "0.20"
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert findings(doctor.logins)["W&B"].remedy == remedy


@pytest.mark.parametrize(("half", "remedy"), [(2.0, False), (0.5, True)])
def test_bfloat16_is_for_where_it_is_faster(
    half: float, remedy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {torch.float32: 100e9, torch.bfloat16: half * 100e9}
    monkeypatch.setattr(rlhf.runs.stopwatch, "matrix_rate", lambda device, dtype: rates[dtype])
    found = findings(doctor.hardware)["bfloat16"]
    assert f"{half * 100:.0f} GFLOPs a second" in found.detail
    assert (found.remedy is not None) == remedy
