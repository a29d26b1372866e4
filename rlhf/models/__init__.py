"""Loading, changing, saving and asking models of any architecture that transformers loads.

adapters.py            LoRA adapters: their files and their place in a model
loading.py             policies and scalar models, with or without an adapter
shared_bases.py        several models over one copy of their frozen weights
interop.py             names that transformers 4 reads in a saved folder
gguf.py                a GGUF file as an ordinary model
architectures.py       what differs between architectures
packed_attention.py    attention over packed rows, only what the mask allows
passes.py              packed passes without gradient over many trees
"""
