"""Loading, changing, saving and asking models of any architecture that transformers loads.

settings.py            which model to load, and its adapter
tokenizers.py          the tokenizer of a model, with chat template and ends
full.py                a full model with every weight from its folder, or a refusal
adapters.py            LoRA adapters: their files and their place in a model
loading.py             policies and scalar models, with or without an adapter
scalar.py              one number a token: reward and value models
limits.py              what a model can read: ids that it embeds, positions
empty.py               models without weights, from their config alone
shared_bases.py        several models over one copy of their frozen weights
saving.py              folders that transformers loads as they are
interop.py             names that transformers 4 reads in a saved folder
gguf.py                a GGUF file as an ordinary model
architectures.py       what differs between architectures
packed_attention.py    attention over packed rows, only what the mask allows
layout.py              how trees become rows for a model, by trying
heads.py               log-probabilities of a policy over a packed row
passes.py              packed passes without gradient over many trees
"""
