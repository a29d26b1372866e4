"""Where a score comes from: reward models, functions of the user's, and sums of them.

All answer `score(...)` with what each response is worth before the KL penalty (`Scored`). The
functions of scores.py are pure, and the caller applies them in this order:

    scores = clip_scores(scores, settings.clip)
    scores = penalize_length(scores, lengths, ...)
    scores = adjust_missing_end(scores, finished_mask, ...)

The clip comes first, or it could swallow the penalties.

    settings.py     what the reward is made of
    scores.py       what every reward answers, and functions of scores
    models.py       reward models: their folder, their card, their scores
    rendering.py    whether two models render a prompt to the same ids
    functions.py    functions of the user's, called with whole batches
    combined.py     ensembles, weighted sums and normalised rewards
    load.py         the reward that the settings name
"""
