"""The programs of the recipe, one folder a stage: `python -m stages.NAME --config FILE`.

together.py runs several of them in one start, for ask.py, which takes the place of `python -m`.
"""
