"""Compare our speed and memory with TRL's, and with the machine's limits.

    python -m benchmarks            ours and TRL's, alternately, in one table
    python -m benchmarks.scaling    our cost over K, batch, length, ptx ratio and model size
    python -m benchmarks.roofline   how close each phase comes to what the machine can do

Each side of a comparison is a program (`benchmarks.ours`, `benchmarks.trl_reward`,
`benchmarks.trl_ppo`) in its own environment. A line on its standard input starts each sample. The
modules that TRL's programs import from this package need only torch.
"""
