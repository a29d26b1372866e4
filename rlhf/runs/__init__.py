"""A program from its settings to its results.

program.py             the door of every program: errors become one line on stderr
settings.py            one loader of settings for all programs
run.py                 a run: what went in, what was measured, what came out
lineage.py             where inputs come from: hashes, commit, versions
files.py               JSON of what runs measure, and hashes of files
folder.py              whose an output folder is, and what may be replaced in it
checkpoints.py         when checkpoints are written, and going on from one
checkpoint_files.py    a training state as files: whole and unaltered, or refused
stateful.py            what a run carries from step to step
interrupts.py          Ctrl-C and SIGTERM: at once, or at the end of a step
stopwatch.py           where the time of a run goes
trackers.py            TensorBoard and Weights & Biases
"""
