"""Report what works on this machine and in this installation, and how to fix the rest.

    python -m tools.doctor

Every line is OK, `no` (only some settings need it) or FAIL (no stage runs without it). `no` and
FAIL come with the command that fixes them. The exit code is 1 if a line says FAIL, otherwise 0.
Other machines are not contacted.

Each check imports what it needs by itself, so that the doctor also runs if packages are missing.
"""

import argparse
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packaging.requirements import Requirement

PACKAGE = "instruct-rlhf"
REINSTALL = "install it again, in a checkout with `pip install --editable .`"
MODULES = {"pyyaml": "yaml"}
"""Maps a package to the module to import, if it has another name."""
EXTRAS = {
    "deepspeed": "ZeRO",
    "tensorboard": "trackers",
    "wandb": "trackers",
    "trackio": "trackers",
    "bitsandbytes": "QLoRA",
    "vllm": "faster sampling, on GPUs",
}
"""Maps a package to the purpose of the settings that need it."""

GLOO_SECONDS = 90
"""How long to wait for a process before giving up."""
_ALL_REDUCE = """
import datetime, sys, torch, torch.distributed as dist
patience = datetime.timedelta(seconds=60)
store = dist.FileStore(sys.argv[1], 2)
store.set_timeout(patience)
dist.init_process_group(
    "gloo", store=store, world_size=2, rank=int(sys.argv[2]), timeout=patience
)
number = torch.ones(1)
dist.all_reduce(number)
dist.destroy_process_group()
sys.exit(number.item() != 2)
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    detail: str
    remedy: str | None = None
    """A command or advice. None means that all is well."""
    is_needed: bool = False
    """Whether no stage runs without it."""

    def __str__(self) -> str:
        if self.remedy is None:
            return f"OK    {self.name}: {self.detail}"
        return f"{'FAIL' if self.is_needed else 'no  '}  {self.name}: {self.detail}; {self.remedy}"


def main(args: Sequence[str] | None = None) -> int:
    """Print the report. Return 1 if something that every stage needs is missing, otherwise 0."""
    argparse.ArgumentParser(
        usage="python -m tools.doctor",
        description="What of this machine and installation works, and how to get the rest.",
    ).parse_args(args)
    failed = False
    for check in (base, bytecode, extras, hardware, attention, deepspeed, processes, logins, space):
        for finding in findings_of(check):
            print(finding, flush=True)
            failed |= finding.is_needed and finding.remedy is not None
    print("the base is not whole: fix what says FAIL" if failed else "the base is whole")
    return int(failed)


def findings_of(check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """Return what a check finds; an error in it is a finding too, so that the report goes on."""
    try:
        return list(check())
    except Exception as error:
        return [Finding(check.__name__, _error_line(error), REINSTALL, check in (base, attention))]


def base() -> Iterator[Finding]:
    """Check Python, and that the packages that all stages need are installed and import."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for requirement in _declared(""):
        found = replace(_package(requirement), is_needed=True)
        if found.remedy is None:
            try:
                importlib.import_module(MODULES.get(requirement.name, requirement.name))
            except Exception as error:
                remedy = f'pip install --force-reinstall "{requirement}"'
                found = replace(
                    found, detail=f"{found.detail}, {_error_line(error)}", remedy=remedy
                )
        yield found


def bytecode() -> Iterator[Finding]:
    """Check that programs need not compile what they import at every start."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.cached is None:
        return  # `base` tells that torch is missing
    is_compiled = Path(spec.cached).is_file()
    if sys.dont_write_bytecode and not is_compiled:
        yield Finding(
            "bytecode",
            "the packages are not compiled and PYTHONDONTWRITEBYTECODE is set, so every start "
            "takes about ten seconds longer",
            "unset PYTHONDONTWRITEBYTECODE",
        )
    else:
        yield Finding("bytecode", "is kept, so that programs start faster")


def extras() -> Iterator[Finding]:
    """Check packages that only some settings need."""
    from packaging.requirements import Requirement

    for name, purpose in EXTRAS.items():
        # An extra may name other packages too, such as a limit on one that it clashes with.
        declared = (one for one in _declared(name) if one.name == name)
        requirement = next(declared, Requirement(name))
        yield replace(_package(requirement), name=f"{name} ({purpose})")


def hardware() -> Iterator[Finding]:
    """Report cores and devices, and whether bfloat16 is faster on them."""
    import torch

    from rlhf.runs.stopwatch import matrix_rate

    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding(
        "processor",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, OMP_NUM_THREADS {threads}",
    )
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield Finding(f"GPU {number}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB")
    if device.type != "cuda":
        yield Finding("GPU", f"no CUDA device; everything runs on {device.type}")
    single, half = (matrix_rate(device, dtype) / 1e9 for dtype in (torch.float32, torch.bfloat16))
    yield Finding(
        "bfloat16",
        f"{half:.0f} GFLOPs a second in matrix products, against {single:.0f} in float32",
        None if half > single else "it would be slower here, keep mixed precision off",
    )


def attention() -> Iterator[Finding]:
    """Check which attention can compute a packed row."""
    import torch
    from packaging.requirements import Requirement
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = torch.randn(3, 1, 2, 6, 8).unbind(0)  # (batch, heads, sequence, head dim)
    mask = torch.tril(torch.ones(6, 6, dtype=torch.bool))
    mask[4:, 2:4] = False  # two responses to one prompt
    found = scaled_dot_product_attention(query, key, value, attn_mask=mask)
    scores = (query @ key.mT / 8**0.5).masked_fill(~mask, -torch.inf)
    is_right = torch.allclose(found, scores.softmax(-1) @ value, atol=1e-5)
    yield Finding(
        "sdpa with a packing mask",
        "right" if is_right else "wrong",
        None if is_right else "pip install --force-reinstall torch",
        is_needed=True,
    )
    if torch.cuda.is_available():
        flash = _package(Requirement("flash-attn"))
        yield (
            flash
            if flash.remedy is None
            else replace(
                flash, remedy="pip install flash-attn --no-build-isolation, or keep attention sdpa"
            )
        )
    else:
        yield Finding("flash attention", "needs a CUDA device; sdpa is used")


def deepspeed() -> Iterator[Finding]:
    """Check that DeepSpeed, if installed, imports and finds what compiles its Adam."""
    if _version("deepspeed") is None:
        return
    try:
        importlib.import_module("deepspeed")
    except Exception as error:
        yield Finding("DeepSpeed", _error_line(error), "pip install --force-reinstall deepspeed")
        return
    tools = (os.environ.get("CXX", "c++"), "ninja")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    yield Finding(
        "DeepSpeed's offloading",
        f"{' and '.join(missing)} missing" if missing else f"{' and '.join(tools)} are there",
        "install what is missing, or leave offloading off" if missing else None,
    )


def processes() -> Iterator[Finding]:
    """Check that two processes can sum a number over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _ALL_REDUCE, str(Path(folder) / "store")]
        both = [
            subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE) for rank in range(2)
        ]
        try:
            said = b"".join(one.communicate(timeout=GLOO_SECONDS)[1] for one in both)
            errors = said.decode(errors="replace")
        except subprocess.TimeoutExpired:
            errors = f"no answer within {GLOO_SECONDS} seconds"
        finally:
            for one in both:
                one.kill()
                one.wait()
    if all(one.returncode == 0 for one in both):
        yield Finding("two processes", "joined over gloo")
    else:
        *_, why = ["their sum is wrong", *errors.splitlines()]
        detail = f"did not join over gloo, {why}"
        yield Finding("two processes", detail, "run on one process")


def logins() -> Iterator[Finding]:
    """Check the login of trackers."""
    if _version("wandb") is None:
        return
    from rlhf.runs.trackers import is_logged_in_to_wandb

    if is_logged_in_to_wandb():
        yield Finding("W&B", "logged in")
    else:
        yield Finding("W&B", "not logged in, so its runs stay on this disk", "wandb login")


def space() -> Iterator[Finding]:
    """Report memory and disk, to compare with `python -m tools.plan`."""
    import psutil

    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(".").free
    yield Finding("memory", f"{memory / 2**30:.0f} GiB available")
    yield Finding("disk", f"{disk / 2**30:.0f} GiB free in this folder")


def _declared(extra: str) -> list["Requirement"]:
    """Return the requirements that the installed package declares for an extra; "" is the base."""
    from packaging.requirements import Requirement

    requirements = []
    for line in metadata.requires(PACKAGE) or ():
        requirement = Requirement(line)
        marker, requirement.marker = requirement.marker, None
        is_base = marker is None or marker.evaluate({"extra": ""})
        is_wanted = is_base or (marker is not None and marker.evaluate({"extra": extra}))
        if is_wanted and (is_base == (extra == "")):
            requirements.append(requirement)
    return requirements


def _package(requirement: "Requirement") -> Finding:
    """Return whether a package is installed in a version that the requirement accepts."""
    name, version = requirement.name, _version(requirement.name)
    remedy = f'pip install "{requirement}"'
    if version is None:
        return Finding(name, "not installed", remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, f"{version}, expected {requirement.specifier}", remedy)
    return Finding(name, version)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _error_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    sys.exit(main())
