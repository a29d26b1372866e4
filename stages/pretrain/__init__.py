"""Pretrain a small causal language model and its tokenizer on plain text.

This stage makes the base model of the tiny pipeline, so that the default needs no download. It
reads `text` records and writes a plain Hugging Face folder. The tokenizer in it holds the chat
template and the special tokens, so that later stages only load it.
"""
