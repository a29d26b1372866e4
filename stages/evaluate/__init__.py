"""Evaluate any number of policies side by side on the same held-out prompts.

The stage reads policies and held-out prompts; a reward model, a gold score, held-out text and a
fact probe are optional. It writes results.json, samples.md and samples.jsonl, prints one table, and
lets tools.report make a page of the run.
"""
