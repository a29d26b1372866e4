"""The programs of the recipe, one folder a stage; each runs as `python -m stages.NAME --config FILE`."""
