"""Several stages in one start: `python -m stages.together make ...` imports what they need once.

Importing torch, transformers and what stands on them takes seconds, at every stage again.

    server.py   imports, runs a command, and gives every stage that it asks for a process of its own
    ask.py      asks for a stage and waits for its end, in the place of `python -m stages.NAME`
"""

ADDRESS = "RLHF_STAGES_TOGETHER"
"""Environment variable with the socket of the server."""
