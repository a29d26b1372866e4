"""The programs of the recipe, one folder a stage: `python -m stages.NAME --config FILE`.

stage_server.py runs several of them from one process. Then stage_client.py takes the place of
`python -m`.
"""
