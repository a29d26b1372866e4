"""The table of docs/scaling.md: which launcher file starts what in these tests.

python -m tests.distributed.table
"""

from pathlib import Path

from tests.distributed.gpu_files import WITH_ADAPTERS

FILES_FOR_GPUS = {
    "cpu2": ["multi_gpu", "fsdp2"],
    "cpu2_zero2": ["deepspeed_zero2"],
    "cpu2_zero3": ["deepspeed_zero3", "deepspeed_zero3_offload"],
}
"""Launcher file -> those for GPUs that its processes try too."""
IN_ONE_PROCESS = {"default": "float32", "cpu": "float32"}
"""Launcher files under which all other tests run, since they start one process -> its type."""
FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
HEAD = ("file", "SFT, RM, PPO-ptx", "the same with adapters", "gradients equal one process's")
NOT_TESTED = "not tested"


def table() -> str:
    """The table in Markdown; a cell says "tested on CPUs", and in which type, or "not tested"."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(path.stem) for path in sorted(FOLDER.glob("*.yaml")))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(name: str) -> tuple[str, ...]:
    if name in IN_ONE_PROCESS:
        tested = f"tested on a CPU, {IN_ONE_PROCESS[name]}"
        return (f"`{name}`", tested, tested, "it is one process")
    if name in FILES_FOR_GPUS:
        tested = "tested on two CPU processes, float32"
        return (f"`{name}`", tested, tested, "to 1e-5")
    if any(name in names for names in FILES_FOR_GPUS.values()):
        tested = "tested on two CPU processes, bf16"
        return (f"`{name}`", tested, tested if name in WITH_ADAPTERS else NOT_TESTED, "to 10 %")
    return (f"`{name}`", NOT_TESTED, NOT_TESTED, NOT_TESTED)


if __name__ == "__main__":
    print(table())
