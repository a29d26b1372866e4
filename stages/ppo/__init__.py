"""PPO and PPO-ptx (Ouyang et al. 2022, section 3.5 and eq. 2).

The stage reads the SFT policy (start and KL reference), the reward model, prompts and pretraining
text. It writes the aligned policy as a plain model folder. An update samples responses, scores
them, subtracts the KL penalty, estimates advantages and takes clipped steps. Each step adds the
gradient of the language modelling loss on pretraining text.

    train.py      the loop: rollout, update, evaluation, log
    rollout.py    samples, scores, KL penalty, advantages
    update.py     the clipped steps on a rollout
    ptx.py        the text's gradient beside that of the episodes
    learner.py    the two models that learn, and their outputs on a row
    evaluate.py   the policy on held-out prompts
    metrics.py    sums and means over a rollout and an update
    glossary.py   what each metric and each alarm means
    monitor.py    alarms
    stopping.py   the last good weights, and where a fault was
    nonfinite.py  the row that makes a gradient NaN
    setup.py      from the settings to all that the loop needs
    data.py       prompts that fit, and text in blocks
    load.py       loads all models
    normalize.py  scores on a common scale
    progress.py   what an update leaves for the next one
    speed.py      tokens a second
"""
