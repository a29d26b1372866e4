"""Pretraining: a small causal language model from plain text, with a tokenizer of its own.

The GPT step, and what makes the embedded default need no download. Reads `text` records; writes a
plain Hugging Face folder whose tokenizer holds the chat template and its special tokens, so that
the next stages only ever load it.
"""
