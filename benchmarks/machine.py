"""Describe and measure the machine that the figures were taken on."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import DType

BF16_ADVANTAGE = 1.0
"""Factor by which bfloat16's matrix products must be faster than float32's to be preferred."""


def describe(num_threads: int) -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return {"device": device, "threads": num_threads, "cores": os.cpu_count()}


def processor() -> str:
    """Return the processor's name, with the vector extensions that decide the speed of bfloat16."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {name.strip(): value.strip() for name, value in facts.items()}
    flags = set(facts.get("flags", "").split())
    known = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{facts.get('model name', platform.processor())} ({', '.join(known)})"


def best_dtype() -> tuple[DType, str]:
    """Return the faster of float32 and bfloat16 on this machine, and the measured reason."""
    rates = {
        dtype: matrix_rate(1024, 576, 1536, dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    fp32, bf16 = (rate / 1e9 for rate in rates.values())
    reason = f"matrix products: {fp32:.0f} GFLOP/s in float32, {bf16:.0f} in bfloat16"
    return ("bfloat16" if bf16 > BF16_ADVANTAGE * fp32 else "float32"), reason


def matrix_rate(rows: int, inner: int, columns: int, dtype: torch.dtype = torch.float32) -> float:
    """Measure the FLOP/s of (rows, inner) @ (inner, columns), the best of several tries."""
    device = default_device()
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(columns, inner, device=device).to(dtype)  # laid out as a linear layer's weight
    seconds = best_seconds(lambda: torch.nn.functional.linear(a, b))
    return 2 * rows * inner * columns / seconds


def memory_bandwidth(num_bytes: int = 3 * 2**27) -> float:
    """Measure bytes a second of the triad a = b + s * c (McCalpin 1995).

    The three arrays take `num_bytes` in all, which must be far more than the caches hold. Two are
    read and one is written. What a processor reads in order to write is not counted.
    """
    count = num_bytes // 3 // 4
    a, b, c = (torch.zeros(count, device=default_device()) for _ in range(3))

    def triad() -> Tensor:
        return torch.add(b, c, alpha=2.0, out=a)

    return 3 * 4 * count / best_seconds(triad)


def best_seconds(function: Any, min_seconds: float = 0.4) -> float:
    """Return the seconds of the fastest of at least three calls.

    The fastest counts, since other programs on the machine can only slow a call down.
    """
    function()
    best, started, calls = float("inf"), time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - started < min_seconds:
        best = min(best, _seconds(function))
        calls += 1
    return best


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _seconds(function: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started
