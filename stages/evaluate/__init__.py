"""Evaluate: any number of policies on the same held-out prompts, side by side.

Reads policies, held-out prompts, and what there is of a reward model, a gold score, held-out text
and a fact probe. Writes results.json, samples.md, samples.jsonl and curves.png, and prints one
table.
"""
