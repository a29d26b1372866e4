"""Tests need no network and use one thread, so that several test processes share the cores."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A launcher or an earlier run may have set these.
for name in (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "ACCELERATE_USE_CPU",
    "ACCELERATE_MIXED_PRECISION",
):
    os.environ.pop(name, None)


def pytest_collection_finish() -> None:
    """Exclude all imported objects from garbage collection.

    Every stage that trains collects garbage at its end, which would take a quarter of a second.
    """
    gc.freeze()
