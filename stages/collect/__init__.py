"""Comparisons: K samples a prompt from a policy, ranked by labelers.

Reads `prompt` records and a policy; writes rankings.jsonl, which the rm stage trains on, and a
report of how far labelers agree. Labelers are people, other models or, in the tiny world,
simulations: anything that a function `package.module:name` makes (see labelers.py).

    sample.py    how many responses each prompt gets, and the responses
    labelers.py  the seam to labelers, and who ranks what
    report.py    agreement, ties, lengths
    collect.py   the stage from start to end
"""
