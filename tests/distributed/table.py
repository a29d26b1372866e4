"""The table of docs/scaling.md: which launcher file starts what in these tests.

python -m tests.distributed.table
"""

from pathlib import Path

from tests.distributed.gpu_files import WITH_ADAPTERS
from tests.distributed.launching import FILES_FOR_GPUS, ONE_GPU, TWO_NODES

IN_ONE_PROCESS = {"default": "float32", "cpu": "float32"}
"""Launcher files under which all other tests run, since they start one process -> its type."""
FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"
HEAD = ("file", "SFT, RM, PPO-ptx", "the same with adapters", "gradients equal one process's")
NOT_TESTED = "not tested"
WHERE = {
    ONE_GPU: "a CPU",
    **{name: "two CPU processes" for names in FILES_FOR_GPUS.values() for name in names},
    **{name: "two nodes of one CPU process" for name in TWO_NODES},
}
"""Launcher file for GPUs -> what started it here."""


def table() -> str:
    """The table in Markdown; each cell says on what it was tested, or that it was not."""
    rows = [HEAD, ("---",) * len(HEAD), *(row(path.stem) for path in sorted(FOLDER.glob("*.yaml")))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(name: str) -> tuple[str, ...]:
    if name in IN_ONE_PROCESS:
        tested = f"tested on a CPU, {IN_ONE_PROCESS[name]}"
        return (f"`{name}`", tested, tested, "it is one process")
    if name in FILES_FOR_GPUS:
        tested = "tested on two CPU processes, float32"
        return (f"`{name}`", tested, tested, "to 1e-5")
    where = WHERE[name]
    tested = f"tested on {where}, bf16"
    return (f"`{name}`", tested, tested if name in WITH_ADAPTERS else NOT_TESTED, "to 10 %")


if __name__ == "__main__":
    print(table())
