"""Compute the bytes and seconds that a run will need, before anything is loaded.

    python -m tools.plan --config configs/ppo/tiny.yaml [--accelerate FILE] [--KEY VALUE]...

It reads only config.json of each model. From the settings come the models without data and the
rows that they get, from these the plan, and from the plan its text:

    launch.py    the launcher's file, and how much memory it takes for a model in each process
    models.py    the models of the settings, without data
    rows.py      the fullest rows that a model gets
    loading.py   the host memory that models take while they load
    vllm.py      what vLLM takes of a GPU
    record.py    the plan: what is held, the peak of each phase, the work
    ppo.py       the plan of PPO's settings
    rm.py        the plan of a reward model's settings
    sft.py       the plan of supervised fine-tuning's settings
    make.py      the plan of any stage's settings
    table.py     the plan as text

The peak of a phase has three parts: what is held all the time, what is held in this phase, and the
most that its passes allocate (rlhf/measuring/allocations.py).

The tests hold the plan against real runs, in one process and in two, under each launcher. GPUs
were never measured. Lengths are the settings' limits, so shorter data need less in the rollout, and
less time.
"""
