"""Takes one optimizer step, whatever is split between the processes.

settings.py         the settings of the optimizer
processes.py        joining the processes of a launcher, and sums over all of them
step.py             one optimizer step: its passes, its norms, its schedule
two_gradients.py    the norms and the cosine of two gradients of one step
sharding.py         gradients and weights under DDP, ZeRO and FSDP2
streaming.py        a few weights of a split model at a time, for the sampler
compat.py           what must be known of the insides of other libraries
parameters.py       the trained parameters of a model, by name
optim.py            optimizer, learning rate schedule, moving average of weights
nonfinite.py        where the first NaN or infinite value is
out_of_memory.py    an out-of-memory error that names the setting to lower
numbers.py          reading several numbers from a device in one wait
offloading.py       models that leave the device between uses
"""
