"""Measure policies on benchmark tasks: zero-, one- and few-shot, and what alignment cost.

The questions, their scoring and the few-shot layout come from lm-evaluation-harness (the package
lm_eval, in the extra `eval`). The answers come from our packed passes and our sampling. The stage
reads policies and task files; it writes results.json, benchmark.md and samples.jsonl, and prints
the tables.
"""
