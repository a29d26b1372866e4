"""What is reported, and what a run needs.

statistics.py     figures and their intervals: accuracies, win rates, means
fact_recall.py    does a model still continue text with what pretraining taught
flops.py          the additions and multiplications that a pass needs
allocations.py    the memory that a pass allocates, found without data
"""
