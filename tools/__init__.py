"""Programs about runs and machines; they may read the settings of every stage.

python -m tools.doctor    what of this machine and installation works
python -m tools.plan      what a run will need, before anything is loaded
python -m tools.export    an adapter and its base as one full model
"""
