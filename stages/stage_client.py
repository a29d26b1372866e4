"""Ask the stage server for a stage: `python -S stages/stage_client.py stages.sft --config FILE`.

The server is stages/stage_server.py. This program imports only a part of the standard library, so
it starts in some hundredths of a second. It prints the command that does the same without a server.
"""

import json
import os
import shlex
import signal
import socket
import sys

ADDRESS = "RLHF_STAGE_SERVER"  # as in stages/stage_server.py


def main() -> int:
    """Run a stage and return its exit code; its output goes where the server's output goes."""
    print("python -m", shlex.join(sys.argv[1:]), flush=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(os.environ[ADDRESS])
        answers = server.makefile(encoding="utf-8")
        request = {"argv": sys.argv[1:], "environment": dict(os.environ)}
        server.sendall(json.dumps(request).encode() + b"\n")
        process = int(answers.readline())
        # Ctrl-C reaches the stage from the terminal, as it reaches this program.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(process, signal.SIGTERM))
        code = answers.readline()
    return int(code) if code else 1


if __name__ == "__main__":
    sys.exit(main())
