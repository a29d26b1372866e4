"""Sample K responses a prompt from a policy, and have labelers rank them.

The stage reads `prompt` records and a policy. It writes rankings.jsonl, which the rm stage trains
on, and a report of how far labelers agree. Labelers may be people, other models or, in the tiny
world, simulations: anything that a function `package.module:name` makes (see labelers.py).

    sample.py    draws how many responses each prompt gets, and samples them
    labelers.py  loads labelers, and asks each for its rankings
    report.py    agreement, ties, lengths
    collect.py   the stage from start to end
"""
