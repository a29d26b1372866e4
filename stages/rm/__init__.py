"""Train a reward model on rankings of K responses; write the scalar model and its reward.json.

Training starts from the SFT model with a new head and takes one epoch. The loss takes all pairs of
a prompt at once (Ouyang et al. 2022, section 3.5 and C.2).

    train.py         the loop: a step, its metrics, held-out figures after each epoch
    update.py        one step: packed prompt trees and the ranking loss
    batches.py       which rankings a step takes, and which of their responses are compared
    setup.py         what is read, and the model that learns
    data.py          turns rankings into token ids; counts what was left out, and why
    measure.py       a model on held-out rankings
    glossary.py      what each metric means
    pair_metrics.py  held-out pair accuracy against labelers and gold, and the length-only baseline
    saved.py         saves the model, measures what was saved, writes reward.json
"""
