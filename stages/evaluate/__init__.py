"""Evaluate any number of policies side by side on the same held-out prompts.

The stage reads policies and held-out prompts; a reward model, a gold score, held-out text and a
fact probe are optional. It writes results.json, samples.md and samples.jsonl, prints one table, and
lets tools.report make a page of the run.

    evaluate.py    the run: measure, score, compare, report
    setup.py       chats, prompts, texts and judges, the same for every policy
    policies.py    what is measured while a policy is in memory
    measures.py    sampling, log-probabilities, KL, win rates and gains
    parts.py       parts of gold: what is right, polite or brief
    pairs.py       the reward model on pairs that differ in one part
    best_of.py     best-of-n from one pool of answers
    warnings.py    reward hacking and other doubts, in words
    other_runs.py  results of the stages before
    report.py      the table and the samples
    glossary.py    what each warning means
"""
