"""Loads a folder as transformers alone does, and tells what it could not place."""

from collections.abc import Collection
from pathlib import Path
from typing import Any


def load_with_report(
    auto_class: Any, folder: str | Path
) -> tuple[Any, dict[str, Collection[object]]]:
    """A model and transformers' report on its weights, such as its `missing_keys`.

    `auto_class` is an Auto class of transformers. Its from_pretrained declares a model alone, but
    returns this pair where the report is asked for.
    """
    return auto_class.from_pretrained(folder, output_loading_info=True)
