"""Loads, changes, saves and runs models of any architecture that transformers loads.

settings.py            which model to load, and its adapter
tokenizers.py          the tokenizer of a model, with chat template and end tokens
full.py                a full model with every weight from its folder, or an error
adapters.py            LoRA adapters: their files and their place in a model
loading.py             policies and scalar models, with or without an adapter
scalar.py              reward and value models: one number per token
limits.py              which token ids and how many positions a model can read
empty.py               models without weights, from their config alone
one_copy.py            files of another type, converted once for all processes of a machine
shared_bases.py        several models over one copy of their frozen weights
saving.py              folders that transformers loads as they are
interop.py             names that transformers 4 reads in a saved folder
architectures.py       what differs between architectures
packed_attention.py    attention over packed rows, computing only what the mask allows
compat.py              what transformers and torch offer no public way to
layout.py              how prompt trees become rows for a model, found by a test pass
heads.py               log-probabilities of a policy over a packed row
passes.py              packed passes without gradient over many prompt trees
"""
