"""Scores responses by reward models, by a user's functions, or by sums of them.

Each reward has `score(...)`, which returns what every response is worth before the KL penalty
(`Scored`). The functions of scores.py are pure, and the caller applies them in this order:

    scores = clip_scores(scores, settings.clip)
    scores = penalize_length(scores, lengths, ...)
    scores = adjust_missing_end(scores, finished_mask, ...)

The clip comes first, because it could cut the penalties off.

    settings.py     what the reward is made of
    scores.py       what every reward returns, and functions of scores
    models.py       reward models: their folder, their card, their scores
    rendering.py    whether two models render a prompt to the same ids
    functions.py    a user's functions, called with whole batches
    combined.py     ensembles, weighted sums and normalised rewards
    load.py         the reward that the settings name
"""
