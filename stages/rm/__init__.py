"""Train a reward model on rankings of K responses; write the scalar model and its reward.json.

Training starts from the SFT model with a new head and takes one epoch. The loss takes all pairs of
a prompt at once (Ouyang et al. 2022, section 3.5 and C.2).

    data.py        turns rankings into token ids; counts what was left out, and why
    trainer.py     transformers' Trainer with packed prompt trees and the ranking loss
    figures.py     held-out pair accuracy against labelers and gold, and the length-only baseline
    train.py       the program
"""
