"""Programs about runs and machines. They may read the settings of every stage.

python -m tools               starts a stage, a tool or a data command by its name (`instruct-rlhf`)
python -m tools.doctor        reports what works on this machine and in this installation
python -m tools.plan          computes what a run will need, before anything is loaded
python -m tools.report        writes a page about a run, or about runs side by side
python -m tools.export        writes a full model of an adapter, or the policy of a checkpoint
python -m tools.metrics_page  writes docs/metrics.md from the stages' tables
"""
