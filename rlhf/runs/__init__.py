"""Takes a program from its settings to its results.

program.py             how every program starts; turns a user's errors into one line on stderr
settings.py            one loader of settings for all programs
run.py                 a run: what it reads, measures and writes
lineage.py             where inputs come from: hashes, commit, versions
code.py                which code makes a run's results
files.py               JSON of what runs measure, and hashes of files
folder.py              who owns an output folder, what may be replaced in it, whether it is current
shared_files.py        whether all machines see the inputs and the output folder
checkpoints.py         when checkpoints are written, and how a run resumes from one
checkpoint_files.py    a training state as files: whole and unaltered, or refused
stateful.py            what a run carries from step to step
interrupts.py          Ctrl-C and SIGTERM: end at once, or at the end of a step
stopwatch.py           where the time of a run goes
glossary.py            what a logged number and an alarm mean
trackers.py            TensorBoard, Weights & Biases and trackio
page.py                keeps a page about a run in its folder, also while it goes on
"""
