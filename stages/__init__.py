"""The programs of the recipe, one folder a stage: `python -m stages.NAME --config FILE`.

together.py runs several of them from one process. Then ask.py takes the place of `python -m`.
"""
