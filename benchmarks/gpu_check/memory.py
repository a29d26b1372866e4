"""Measure the device's memory: what the allocator holds, and the peak that tools.plan predicts."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_check.models import ppo_loop, release_memory
from benchmarks.gpu_check.records import Emit, Row
from benchmarks.gpu_check.setting import Setting
from benchmarks.machine import default_device
from tools.plan.launch import Launch
from tools.plan.make import make_plan

GB = 1e9
NUM_UPDATES = 2
"""The optimizer's moments are there from the first step on, so the second update has the peak."""


def allocator(setting: Setting, emit: Emit) -> None:
    """Report how much memory the caching allocator holds in a rollout, and how much is used."""
    loop = ppo_loop(setting, "autocast")
    points: list[tuple[int, int]] = []

    def note(_: nn.Module, __: Any, ___: Any) -> None:
        points.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    loop.learner.models.policy.register_forward_hook(note)
    loop.roll_out()
    emit(summary(points, int(torch.cuda.memory_stats().get("num_alloc_retries", 0))))


def summary(points: Sequence[tuple[int, int]], num_retries: int) -> Row:
    """Return the row of a rollout from (allocated, reserved) bytes at each of its passes."""
    (first, _), (_, last) = points[0], points[-1]
    most = max(allocated for allocated, _ in points)
    return {
        "allocated at first, GB": first / GB,
        "most allocated, GB": most / GB,
        "reserved at last, GB": last / GB,
        "reserved / most allocated": last / most,
        "largest gap, GB": max(reserved - allocated for allocated, reserved in points) / GB,
        "retries": num_retries,
    }


def peak(setting: Setting, emit: Emit) -> None:
    """Report the plan's peak of a PPO update, and on a GPU the measured one."""
    device = default_device().type
    before = _start_of_peak() if device == "cuda" else 0
    loop = ppo_loop(setting, "autocast")
    for _ in range(NUM_UPDATES):
        loop.update()
    plan = make_plan(loop.config, Launch(mixed_precision="bf16", device=device))
    phase = max(plan.phases, key=lambda name: plan.phases[name])
    row: Row = {"planned, GB": plan.peak / GB, "planned in phase": phase}
    if device == "cuda":
        measured = torch.cuda.max_memory_allocated() - before
        row |= {"measured, GB": measured / GB, "measured / planned": measured / plan.peak}
    else:
        row["note"] = "skipped: only a GPU counts the bytes of tensors"
    emit(row)


def _start_of_peak() -> int:
    """Forget the peak so far; return the bytes that earlier parts left allocated."""
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()
