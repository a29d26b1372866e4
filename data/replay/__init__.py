"""Sample text from a base model, to stand in for its pretraining data.

    python -m data.replay --model.path runs/smollm2/base --output_dir runs/smollm2/replay

The pretraining mix of PPO-ptx keeps what the base model knows, if its text is like the text the
base model learned from. Few people have that text. A sample of the model itself follows the same
distribution as far as the model knows it: minus the log-probability of such text, averaged, is the
KL divergence from the base model to the policy, plus a constant. The idea is pseudorehearsal
(Robins 1995, "Catastrophic forgetting, rehearsal and pseudorehearsal").

    config.py    the settings
    build.py     samples the documents and writes them
"""
