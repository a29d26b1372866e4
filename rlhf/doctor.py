"""`python -m rlhf.doctor`: what of this machine and installation works, and how to get the rest.

Each line is OK, or the command that mends it. The exit code is 0 if all that the base needs is
there; what only extras need is reported and not counted. Nothing here is imported before its line,
so the doctor also runs where half of the packages are missing.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

PROJECT = "instruct-rlhf"
REINSTALL = "pip install --editable ."
MIN_DISK, MIN_MEMORY = 5, 4
"""GiB that the default preset is at ease with."""

_ALL_REDUCE = """
import sys, datetime, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], world_size=2,
                        rank=int(sys.argv[2]), timeout=datetime.timedelta(seconds=60))
one = torch.ones(1)
dist.all_reduce(one)
dist.destroy_process_group()
sys.exit(one.item() != 2)
"""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    detail: str
    remedy: str | None = None
    """A command or an advice; None means that all is well."""
    is_needed: bool = False
    """The base does not work without it."""

    def __str__(self) -> str:
        if self.remedy is None:
            return f"OK    {self.name}: {self.detail}"
        return f"{'FAIL' if self.is_needed else 'no  '}  {self.name}: {self.detail}; {self.remedy}"


def main() -> int:
    """Print the report; 1 if something that the base needs is missing, else 0."""
    failed = False
    for check in (base, extras, hardware, attention, deepspeed_ops, processes, logins, space):
        try:
            findings = list(check())
        except Exception as error:  # a doctor must get to the end whatever is broken
            detail = " ".join(f"{type(error).__name__}: {error}".split())
            needed = check in (base, attention)
            findings = [Finding(check.__name__, f"failed, {detail}", REINSTALL, needed)]
        for finding in findings:
            print(finding, flush=True)
            failed |= finding.is_needed and finding.remedy is not None
    print("the base is not whole: mend what says FAIL" if failed else "the base is whole")
    return int(failed)


def base() -> Iterator[Finding]:
    """Python and the packages that all stages need."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for requirement in _requirements():
        yield _installed(requirement, is_needed=True)


def extras() -> Iterator[Finding]:
    """Packages that only some settings need, by what they are for."""
    for name, purpose in {
        "deepspeed": "ZeRO",
        "tensorboard": "trackers",
        "wandb": "trackers",
        "bitsandbytes": "QLoRA, on GPUs",
        "vllm": "faster sampling, on GPUs",
    }.items():
        found = _installed(name, is_needed=False)
        yield Finding(f"{name} ({purpose})", found.detail, found.remedy)


def hardware() -> Iterator[Finding]:
    """Devices, cores and what they compute in."""
    import torch

    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    yield Finding(
        "processor",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, OMP_NUM_THREADS {threads}",
    )
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        yield Finding(f"GPU {number}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    if not torch.accelerator.is_available():
        yield Finding("GPU", "none; everything runs on the CPU")
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        has_bf16 = "avx512_bf16" in flags or "amx_bf16" in flags
    detail = "computed in hardware" if has_bf16 else "no hardware for it"
    yield Finding("bfloat16", detail, None if has_bf16 else "keep mixed precision off")


def attention() -> Iterator[Finding]:
    """What a packed row can be computed with."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = torch.randn(3, 1, 2, 6, 8).unbind(0)
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
        yield Finding("flex attention", "compiled for the GPU")
        yield _installed("flash_attn", is_needed=False)
    else:
        yield Finding("flex and flash attention", "need a GPU; sdpa is used")


def deepspeed_ops() -> Iterator[Finding]:
    """Whether DeepSpeed's Adam for offloading to the CPU can be built."""
    if importlib.util.find_spec("deepspeed") is None:
        return
    builder = importlib.import_module("deepspeed.ops.op_builder").CPUAdamBuilder()
    works = builder.is_compatible(verbose=False)
    compiler = shutil.which("c++") or shutil.which("g++")
    remedy = None if works and compiler else "install a C++ compiler, or leave offloading off"
    yield Finding("DeepSpeed's CPU Adam", "can be built" if remedy is None else "cannot", remedy)


def processes() -> Iterator[Finding]:
    """Two processes add up a number over gloo."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _ALL_REDUCE, str(Path(folder) / "store")]
        both = [
            subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
            for rank in range(2)
        ]
        errors = [one.communicate(timeout=120)[1] for one in both]
    works = all(one.returncode == 0 for one in both)
    last = [line for error in errors for line in error.splitlines()][-1:]
    detail = "joined over gloo" if works else f"did not join: {''.join(last)}"
    yield Finding("two processes", detail, None if works else "run on one process")


def logins() -> Iterator[Finding]:
    """Trackers; none is needed."""
    if importlib.util.find_spec("wandb") is None:
        return
    from rlhf.trackers import is_logged_in_to_wandb

    is_in = is_logged_in_to_wandb()
    detail = "logged in" if is_in else "not logged in, so runs stay offline"
    yield Finding("W&B", detail, None if is_in else "wandb login")


def space() -> Iterator[Finding]:
    """Room on the disk of the current folder, and memory."""
    disk = shutil.disk_usage(".").free / 2**30
    remedy = None if disk >= MIN_DISK else f"free {MIN_DISK} GiB"
    yield Finding("disk", f"{disk:.0f} GiB free here", remedy)
    import psutil

    memory = psutil.virtual_memory().available / 2**30
    remedy = None if memory >= MIN_MEMORY else f"free {MIN_MEMORY} GiB, or take a smaller preset"
    yield Finding("memory", f"{memory:.0f} GiB available", remedy)


def _requirements() -> list[str]:
    """Those of the base, as pyproject.toml declares them."""
    declared = metadata.requires(PROJECT) or []
    return [line for line in declared if "extra ==" not in line]


def _installed(requirement: str, *, is_needed: bool) -> Finding:
    from packaging.requirements import Requirement

    wanted = Requirement(requirement)
    remedy = f'pip install "{requirement}"'
    try:
        version = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return Finding(wanted.name, "not installed", remedy, is_needed)
    if not wanted.specifier.contains(version, prereleases=True):
        detail = f"{version}, expected {wanted.specifier}"
        return Finding(wanted.name, detail, remedy, is_needed)
    return Finding(wanted.name, version)


if __name__ == "__main__":
    sys.exit(main())
