"""Report the machine and its packages."""

from importlib import metadata

import torch

from benchmarks import machine
from benchmarks.gpu_check.records import Emit
from benchmarks.gpu_check.setting import Setting
from rlhf.runs.lineage import commit
from tools import doctor

PACKAGES = ("torch", "triton", "transformers", "accelerate", "trl", "peft", "flash-attn")


def environment(setting: Setting, emit: Emit) -> None:
    """Report package versions, what is missing of the base, and what the device can do."""
    emit({"name": "commit", "found": commit()})
    emit({"name": "device", "found": machine.describe(torch.get_num_threads())["device"]})
    for name in PACKAGES:
        emit({"name": name, "found": _version(name)})
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        emit({"name": "CUDA", "found": f"{torch.version.cuda}, capability {major}.{minor}"})
        emit({"name": "memory", "found": f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free"})
    findings = [one for one in doctor.findings_of(doctor.base) if one.remedy is not None]
    for check in (doctor.hardware, doctor.attention, doctor.space):
        findings += doctor.findings_of(check)
    for finding in findings:
        emit({"name": finding.name, "found": finding.detail, "remedy": finding.remedy})


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"
