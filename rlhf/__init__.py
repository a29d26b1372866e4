"""The library that all stages share, in eight wings. A wing imports only from those below it.

measuring     what is reported: statistics, fact recall, FLOPs, memory
rewards       where a score comes from
generation    sampling responses
models        loading, changing, saving and asking models
runs          a program from its settings to its results
training      one optimizer step, whatever is split between processes
inputs        from a row on disk to token ids and packed rows
maths         tensors in, tensors out
"""
