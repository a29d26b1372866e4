"""A GGUF file (llama.cpp's format, often quantised) as an ordinary model with plain weights."""

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

    transformers leaves a mark of the quantisation on the model, with which save_pretrained refuses;
    the weights therefore move into a model made from the same config without the mark.

    Raises:
        ValueError: the file is no GGUF file.
        OSError: the file cannot be read.
    """
    file = Path(path)
    _check_magic(file)
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
        raise ValueError(f"{file} is no GGUF file: it starts with {start!r}, expected {_MAGIC!r}")
