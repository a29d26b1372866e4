"""One optimizer step, whatever is split between the processes.

settings.py         the settings of the optimizer
processes.py        joining the processes of a launcher, and sums over all of them
sharding.py         a step, and a look at the weights, under DDP, ZeRO and FSDP2
parameters.py       what of a model is trained, by name
optim.py            optimizer, learning rate schedule, moving average of weights
nonfinite.py        where the first NaN or infinite value stands
out_of_memory.py    memory that runs out, told with the setting to lower
offloading.py       models that leave the device between uses
"""
