"""Speed and memory against what a user would take instead, and against the machine's limits.

    python -m benchmarks            ours and TRL's, alternately, one table
    python -m benchmarks.scaling    our cost over K, batch, length, ptx ratio and model size
    python -m benchmarks.roofline   how close each phase comes to what the machine can do

Each side of a comparison is a program of its own (`benchmarks.ours`, `benchmarks.trl_reward`,
`benchmarks.trl_ppo`), in an environment of its own, that is told over its standard input when to
run one sample. What the programs of TRL import of this package needs torch alone.
"""
