"""Starts the processes of launcher files for the tests, each file once."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile

import pytest
from safetensors.torch import save_file

from rlhf.training import processes
from tests.distributed.gpu_files import Part, run_under

ROOT = Path(__file__).parents[2]
FILES_FOR_GPUS = {
    "cpu2": ["multi_gpu", "fsdp2"],
    "cpu2_zero2": ["deepspeed_zero2"],
    "cpu2_zero3": ["deepspeed_zero3", "deepspeed_zero3_offload"],
}
"""Launcher file -> those for GPUs that its processes try too."""
ONE_GPU = "gpu"
"""The file for one GPU. It needs no launch: the process of the tests takes its settings."""
TWO_NODES = {
    "two_nodes_ddp": ("cpu2", "multi_gpu"),
    "two_nodes_fsdp2": ("cpu2", "fsdp2"),
    "two_nodes_zero3": ("cpu2_zero3", "deepspeed_zero3"),
}
"""File for two nodes -> the launch that tries the same on one node, and the file that it takes."""
OPTIONS_OF_A_NODE = "--machine_rank {rank} --main_process_ip {address} --num_processes {count}"
"""What docs/scaling.md says to give on each node."""
TIME_LIMIT = 400
"""Seconds for all that one launch does, on a busy machine; a hang is found by it."""


class Launched(dict[str, Path]):
    """Maps a launcher file to the folder with what its processes made. Each is started once, when
    a test first asks for it. If it fails, which may take minutes, it is not started again.

    Args:
        inputs: What `make_inputs` of tests/distributed/chain.py wrote.
        asked: What the selected tests need of each file. Under a file for GPUs nothing else is run,
            and in float32 a step of each loss and the three stages.
    """

    def __init__(
        self, inputs: Path, factory: pytest.TempPathFactory, asked: Mapping[str, Collection[Part]]
    ) -> None:
        super().__init__()
        self._inputs = inputs
        self._factory = factory
        self._asked = asked
        self._failed: set[str] = set()

    def __missing__(self, name: str) -> Path:
        assert name not in self._failed, f"the launch of {name} failed in an earlier test"
        self._failed.add(name)
        folder = self._factory.mktemp(name)
        self._start(name, folder)
        self._failed.remove(name)
        self[name] = folder
        return folder

    def _start(self, name: str, folder: Path) -> None:
        if name == ONE_GPU:
            self._run_here(name, folder)
        elif name in TWO_NODES:
            program = str(ROOT / "tests/distributed/node.py")
            run_on_two_nodes(name, program, name, str(self._inputs), str(folder))
        else:
            program = str(ROOT / "tests/distributed/driver.py")
            files = {
                file: sorted(self._asked[file])
                for file in FILES_FOR_GPUS[name]
                if file in self._asked
            }
            parts = sorted(self._asked.get(name, ()))
            arguments = [str(self._inputs), str(folder), json.dumps(parts), json.dumps(files)]
            (printed,) = launch(name, [[program, *arguments]])
            (folder / "printed.txt").write_text(printed, encoding="utf-8")

    def _run_here(self, name: str, folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(processes, "use_share_of_cores", lambda: None)  # the tests have set it
            gradients, seen = run_under(name, self._inputs, folder / name, self._asked[name])
        save_file(gradients, folder / f"{name}.safetensors")
        (folder / "seen.json").write_text(json.dumps({"files": {name: seen}}))


def run_on_two_nodes(name: str, *program: str) -> list[str]:
    """Start a file for two nodes as docs/scaling.md says. Both nodes are this machine.

    Args:
        program: The program and its arguments, after options of the launcher if there are any.

    Returns:
        What each node printed.
    """
    port = ["--main_process_port", str(_free_port())]
    options = [OPTIONS_OF_A_NODE.format(rank=i, address="127.0.0.1", count=2) for i in range(2)]
    return launch(name, [[*one.split(), *port, *program] for one in options])


def launch(name: str, commands: Sequence[Sequence[str]]) -> list[str]:
    """Start launchers side by side, each with a file and one of these commands; wait for their
    ends.

    Returns:
        What each launch printed.
    """
    start = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    path = str(ROOT / f"configs/accelerate/{name}.yaml")
    printed: list[str] = []
    with ExitStack() as stack:
        outputs = [stack.enter_context(TemporaryFile("w+")) for _ in commands]
        started = [
            subprocess.Popen(
                [*start, path, *command],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
            for command, output in zip(commands, outputs, strict=True)
        ]
        for one in started:
            stack.callback(one.terminate)
        for one, output in zip(started, outputs, strict=True):
            returned = one.wait(TIME_LIMIT)
            output.seek(0)
            printed.append(output.read())
            assert returned == 0, printed[-1]
    return printed


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
