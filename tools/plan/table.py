"""Formats a plan as a table."""

import torch

from tools.plan.record import Plan


def show(plan: Plan, rate: float, dtype: torch.dtype, host_bytes: int) -> str:
    """Format the plan as a table.

    Args:
        rate: FLOPs a second in this type.
        host_bytes: Memory of this machine, to compare with what its processes need.
    """
    launch = plan.launch
    split = f", {launch.name}" if launch.name else ""
    each = (
        "one process" if launch.num_processes == 1 else f"each of {launch.num_processes} processes"
    )
    lines = [f"plan for {each} on {launch.device}, mixed precision {launch.mixed_precision}{split}"]

    def add(title: str, rows: dict[str, int], marked: int | None = None) -> None:
        lines.extend(["", title] if rows else [])
        for name, value in rows.items():
            mark = "  <- peak" if value == marked else ""
            lines.append(f"  {name:<46}{value / 1e6:>12,.1f} MB{mark}")

    add("held all the time", plan.held | {"together": sum(plan.held.values())})
    add("offloaded to CPU memory, in each process", plan.waiting)
    add("what phases need besides", {name: size for name, size in plan.parts.items() if size})
    add("peak of each phase, all in all", plan.phases, plan.peak)
    count = launch.num_local_processes
    together = "its process" if count == 1 else f"its {count} processes together"
    add(f"memory of a machine's host, for {together}", plan.host)
    if (most := max(plan.host.values())) > host_bytes:
        lines.append(
            f"  warning: this machine has {host_bytes / 1e9:,.0f} GB, and {most / 1e9:,.0f} GB are "
            "needed; take a larger machine, or fewer processes on each"
        )
    lines += ["", f"seconds of {plan.work}, at the matrix rate of this machine (an estimate: "]
    lines[-1] += f"{rate / 1e9:,.0f} GFLOPS in {str(dtype).removeprefix('torch.')})"
    seconds = {name: flops / rate for name, flops in plan.flops.items() if flops}
    for name, value in (seconds | {"together": sum(seconds.values())}).items():
        lines.append(f"  {name:<46}{value:>12,.3f} s")
    lines.append("  a lower bound: no pass reaches the rate, and sampling waits for memory")
    return "\n".join(lines)
