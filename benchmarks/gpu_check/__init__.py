"""Check on one GPU what no CPU can check: `make gpu-check`, at most nine minutes.

    __main__     the options, and the order of the parts
    parts        each part with its question and its time limit
    records      what a part found, as JSON and on one page
    runner       starts the worker, and ends a part at its limit
    worker       runs the parts in a process of its own
    setting      how much work the parts are given
    environment, models, suite, noise, decoding, rows, memory, peers    the parts

Only the parts import other packages than the standard library, so that the page is written
whatever package is missing. Nothing here ran on a GPU yet (docs/scaling.md).
"""
