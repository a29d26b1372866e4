"""The door of every program: settings in, one line on stderr for what a user can mend."""

import io
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

from safetensors import SafetensorError

from rlhf.runs.interrupts import interrupts
from rlhf.runs.settings import load_config
from rlhf.training.out_of_memory import explain, is_out_of_memory

Config = TypeVar("Config")

USER_ERROR = 2
INTERRUPTED = 130


def run_stage(
    function: Callable[[Config], object],
    config_class: type[Config],
    args: Sequence[str] | None = None,
) -> None:
    """Load the settings and call `function` with them.

    ValueError (settings, records), OSError (files) and a lack of memory end the program with
    `error: ...` on stderr and exit code 2, an interrupt (Ctrl-C, SIGTERM) with 130; anything else
    is our mistake and keeps its traceback.
    """
    escape_what_the_terminal_lacks()
    try:
        with interrupts.caught():
            function(load_config(config_class, args))
        return
    except (ValueError, OSError, SafetensorError) as error:  # the last one where a disk is full
        message, code = f"error: {error}", USER_ERROR
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        message, code = f"error: {explain(error)}", USER_ERROR
    except KeyboardInterrupt as interrupt:
        message, code = str(interrupt) or "interrupted", INTERRUPTED
    # Only here are the frames of the failed call gone, and with them a progress bar whose line the
    # message would continue.
    _stop(message, code)


def escape_what_the_terminal_lacks() -> None:
    """Makes printing a character that the terminal's encoding lacks write its code instead.

    Rows of users hold any character; a terminal of cp1252 or ASCII is no fault of theirs.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _stop(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(code)
