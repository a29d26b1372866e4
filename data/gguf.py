"""Read a GGUF file (llama.cpp's format, often quantised) as a model with plain weights."""

import importlib.util
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.inputs.template import add_missing_parts

_MAGIC = b"GGUF"


def load_gguf(
    path: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a GGUF file's weights, dequantised, and its tokenizer.

    transformers marks the model as quantised, and save_pretrained refuses a marked model. So the
    weights move into a model made from the same config without the mark.

    Raises:
        ValueError: The file is not a GGUF file, or the package gguf is not installed.
        OSError: The file cannot be read.
    """
    file = Path(path)
    _check_magic(file)
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file} is read by the package gguf, which is missing: pip install gguf")
    folder, name = str(file.parent), file.name
    tokenizer = add_missing_parts(AutoTokenizer.from_pretrained(folder, gguf_file=name))
    marked = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=dtype)
    config = marked.config
    config.__dict__.pop("quantization_config", None)
    config.pad_token_id = tokenizer.pad_token_id
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(marked.state_dict())
    model.generation_config = GenerationConfig.from_model_config(config)
    return model.eval(), tokenizer


def _check_magic(file: Path) -> None:
    with file.open("rb") as opened:
        start = opened.read(len(_MAGIC))
    if start != _MAGIC:
        raise ValueError(
            f"{file} is not a GGUF file: it starts with {start!r}, expected {_MAGIC!r}"
        )
