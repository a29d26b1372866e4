"""The programs of the recipe, one folder a stage: `python -m stages.NAME --config FILE`."""
