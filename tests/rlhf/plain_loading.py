"""Loads a folder as transformers alone does, and returns its report on the weights."""

from collections.abc import Collection
from pathlib import Path
from typing import Any


def load_with_report(
    auto_class: Any, folder: str | Path
) -> tuple[Any, dict[str, Collection[object]]]:
    """Return a model and transformers' report on its weights, such as its `missing_keys`.

    `auto_class` is an Auto class of transformers. Its from_pretrained is annotated to return a
    model alone, but returns this pair if the report is wanted.
    """
    return auto_class.from_pretrained(folder, output_loading_info=True)
