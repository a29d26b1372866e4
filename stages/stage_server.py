"""Run several stages and import their libraries once: `python -m stages.stage_server make ...`.

Every new process takes seconds to import torch and transformers. This program imports them, then
runs a command. It forks once for each stage that the command asks for (stages/stage_client.py).
"""

import atexit
import gc
import importlib
import importlib.util
import json
import logging
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import torch

from rlhf.runs.code import hash_of_library

ADDRESS = "RLHF_STAGE_SERVER"
"""Environment variable that holds the path of the server's socket."""
PROGRAMS = (
    "data.tinyworld.build",
    "stages.pretrain.train",
    "stages.sft.train",
    "stages.collect.collect",
    "stages.rm.train",
    "stages.ppo.train",
    "stages.evaluate.evaluate",
)
"""Modules to import before the first stage starts."""
OPTIONAL_MODULES = ("deepspeed",)
"""Modules that accelerate imports within each stage that trains, if they are installed."""
POLL_SECONDS = 0.05


def main(command: Sequence[str]) -> int:
    """Run a command that asks for stages (stages/stage_client.py), and return its exit code.

    This process imports the libraries and does nothing else before it forks. So every stage has
    its own memory, threads and signals, as under `python -m`.
    """
    for name in PROGRAMS:
        importlib.import_module(name)
    prepare_to_fork()
    folder = tempfile.mkdtemp()  # only this user can open it
    outcome = _serve(command, str(Path(folder, "socket")))
    if isinstance(outcome, socket.socket):
        _be_stage(outcome)
    shutil.rmtree(folder)
    return outcome


def prepare_to_fork() -> None:
    """Do once what each forked stage would do again."""
    logging.disable()  # DeepSpeed warns of a machine without a GPU
    for name in OPTIONAL_MODULES:
        if importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
    logging.disable(logging.NOTSET)
    hash_of_library()  # cached, so that no stage computes it again
    gc.freeze()  # the stages' garbage collection leaves the pages of what is imported shared


def _serve(command: Sequence[str], address: str) -> int | socket.socket:
    """Return the command's exit code, or, in the process of a stage, its connection."""
    # The terminal sends Ctrl-C to the command and the stages too; they end first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    running: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX) as listener, selectors.DefaultSelector() as selector:
        listener.bind(address)
        listener.listen()
        selector.register(listener, selectors.EVENT_READ)
        child = subprocess.Popen(command, env={**os.environ, ADDRESS: address})
        signal.signal(signal.SIGTERM, lambda *_: child.terminate())
        while child.poll() is None or running:
            if selector.select(POLL_SECONDS):
                connection, _ = listener.accept()
                process = os.fork()
                if process == 0:
                    return connection
                running[process] = connection
                _answer(connection, process)
            _answer_for_ended(running)
    return _as_shell(child.returncode)


def _answer_for_ended(running: dict[int, socket.socket]) -> None:
    for process in list(running):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            with running.pop(process) as connection:
                _answer(connection, _as_shell(os.waitstatus_to_exitcode(status)))


def _answer(connection: socket.socket, number: int) -> None:
    with suppress(ConnectionError):  # whoever asked is gone; the other stages go on
        connection.sendall(b"%d\n" % number)


def _as_shell(code: int) -> int:
    """Return the exit code, or 128 plus the number of the signal that ended the process."""
    return code if code >= 0 else 128 - code


def _be_stage(connection: socket.socket) -> NoReturn:
    """Read which stage is asked for, run it in this process, and end the process."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with connection, connection.makefile(encoding="utf-8") as lines:
        request = json.loads(lines.readline())
    os.environ.clear()
    os.environ.update(request["environment"])
    if threads := os.environ.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # OpenMP read the variable when it was loaded
    program, *words = request["argv"]
    sys.argv = [program, *words]
    runpy.run_module(program, run_name="__main__", alter_sys=True)
    # The interpreter would tear down all that was imported, which takes as long as a short stage.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
