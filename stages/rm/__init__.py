"""The reward model: rankings of K responses in, a scalar model and its reward.json out.

Starts from the SFT model with a new head; one epoch; the loss takes all pairs of a prompt at once
(Ouyang et al. 2022, section 3.5 and C.2).

    data.py        rankings -> examples, prompts and responses as ids; what was left out, and why
    trainer.py     transformers' Trainer with packed prompt trees and the ranking loss
    figures.py     held-out pair accuracy, against labelers, gold and the length-only baseline
    train.py       the program
"""
