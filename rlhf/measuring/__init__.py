"""Measures what stages report, and what a run needs.

statistics.py     accuracies, win rates and means, with their intervals
fact_recall.py    whether a model still continues text with facts from pretraining
flops.py          the additions and multiplications that a pass needs
allocations.py    the memory that a pass allocates, found without data
"""
