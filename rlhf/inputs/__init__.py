"""From a row on disk to token ids and packed rows. Imports nothing else of ours.

records.py        the four records that stages exchange, each checked field by field
files.py          records on disk and from the hub: read, written, split by prompt
template.py       what a chat template writes around prompts and answers
ranges.py         a value of a setting is in its range, or refused
control.py        text to ids where only a template's own names are control tokens
chat.py           the one rendering of prompts and responses to token ids
fitting.py        a prompt that fits: from records to ids, oldest turns left out
packing.py        prompt trees laid into rows without padding, and results brought back
whole_files.py    a file is the old one or the whole new one
shuffling.py      the order in which things are taken, and where in it a run stands
"""
