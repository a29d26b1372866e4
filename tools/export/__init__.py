"""Write a plain model folder from an adapter and its base, or from a checkpoint of PPO.

    python -m tools.export --folder runs/mine/ppo --output_dir merged
    python -m tools.export --folder runs/mine/ppo/checkpoints/step-15 --output_dir before_the_alarm

The first is for programs that cannot read adapters. The second gives the policy of a run that was
killed, or that raised an alarm later.

    config.py    the settings
    export.py    merges the adapter, or reads the checkpoint, and writes the folder
"""
