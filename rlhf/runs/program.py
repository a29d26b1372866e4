"""Starts every program: reads settings, and turns errors a user can fix into one line on stderr."""

import gc
import io
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from safetensors import SafetensorError

from rlhf.runs.interrupts import interrupts
from rlhf.runs.settings import load_config

Config = TypeVar("Config")

USER_ERROR = 2
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def run_stage(
    function: Callable[[Config], object],
    config_class: type[Config],
    args: Sequence[str] | None = None,
) -> None:
    """Load the settings and call `function` with them.

    Some errors are for the user to fix: ValueError (settings, records), OSError (files) and a lack
    of memory. They end the program with `error: ...` on stderr and exit code 2. An interrupt
    (Ctrl-C, SIGTERM) ends it with 130. Any other error is our mistake and keeps its traceback.
    """
    escape_unprintable()
    try:
        with interrupts.caught():
            function(load_config(config_class, args))
        gc.freeze()  # spares the interpreter's last collection, a second for all that is imported
        return
    except (ValueError, OSError, SafetensorError) as error:  # the last one if the disk is full
        message, code = f"error: {error}", USER_ERROR
    except (RuntimeError, MemoryError) as error:
        from rlhf.training.out_of_memory import explain, is_out_of_memory  # needs torch

        if not is_out_of_memory(error):
            raise
        message, code = f"error: {explain(error)}", USER_ERROR
    except KeyboardInterrupt as interrupt:
        message, code = str(interrupt) or "interrupted", INTERRUPTED
    # Print only here: the frames of the failed call are gone, and so is any progress bar. Before
    # that the message would continue the bar's line.
    _stop(message, code)


def escape_unprintable() -> None:
    """Print the code of a character that the terminal's encoding lacks, instead of failing.

    Users' rows may hold any character, and some terminals only show cp1252 or ASCII.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _stop(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
