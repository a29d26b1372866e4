"""One optimizer step, whatever is split between the processes.

processes.py     joining the processes of a launcher, and sums over all of them
sharding.py      a step, and a look at the weights, under DDP, ZeRO and FSDP2
optim.py         optimizer, learning rate schedule, moving average of weights
nonfinite.py     where the first NaN or infinite value stands
offloading.py    memory that runs out, and models that leave the device between uses
"""
