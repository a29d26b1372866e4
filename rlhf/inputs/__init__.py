"""Turns a row on disk into token ids and packed rows. Imports no other wing of rlhf.

records.py        the four records that stages exchange, each checked field by field
files.py          records on disk and from the hub: read, written, split by prompt
template.py       what a chat template writes around prompts and answers
ranges.py         refuses a setting whose value is out of range
control.py        text to ids, where only names that a template wrote are control tokens
chat.py           the one rendering of prompts and responses to token ids
fitting.py        prompts that fit a limit: from records to ids, oldest turns left out
packing.py        prompt trees packed into rows without padding, and results unpacked
block_masks.py    which tokens of a packed row belong together, for FlexAttention
whole_files.py    files that are always the old one or the whole new one
streams.py        a named stream of random numbers for every use of them
shuffling.py      the order of items, and how far in it a run is
"""
