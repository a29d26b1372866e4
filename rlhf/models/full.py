"""Loads a full model with every weight from its folder; refuses any other folder."""

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from rlhf.models.adapters import CONFIG_FILE, HEAD
from rlhf.models.architectures import check_is_known, check_is_policy, scalar_class, with_attention
from rlhf.models.compat import keep_four_bits_trainable
from rlhf.models.one_copy import load_once
from rlhf.models.packed_attention import take_packed_rows
from rlhf.models.settings import ModelSettings

FOUR_BIT_BLOCK = 64
"""Weights that share one scale in bitsandbytes' 4 bits."""


def disable_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Set evaluation mode, and every dropout rate to 0, so that training mode has none either.

    With dropout, the ratio of PPO's first step is not 1 and the KL is noise (docs/recipe.md,
    mistake 14). The saved config keeps the architecture's own rates.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or name == "layerdrop") and isinstance(value, float):
                setattr(module, name, 0.0)
    model.eval()
    return model


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Make each layer recompute its activations in the backward pass, in training mode.

    Activations of one layer are in memory instead of all. A step takes about a third more time. The
    gradients are the same."""
    with warnings.catch_warnings():
        # The new name of this method in transformers 5.23 does not exist in 5.19.
        warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and its loading report, which this module checks."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def load_full(
    auto_class: Any,
    settings: ModelSettings,
    *,
    new_weights: Sequence[str] = (),
    quantize: str = "none",
    is_merged: bool = False,
) -> Any:
    """Load a full model with every weight from its folder, except those in `new_weights`.

    Args:
        is_merged: Whether an adapter will be merged into the weights. Processes cannot share them.
    """
    check_folder(settings.path)
    arguments: dict[str, Any] = {}
    if auto_class is AutoModelForSequenceClassification:
        arguments["num_labels"] = 1
    if quantize == "4bit":
        arguments["quantization_config"] = _four_bits(settings)
    with quiet_transformers(), naming_model(settings.path):
        config = AutoConfig.from_pretrained(
            settings.path, trust_remote_code=settings.trust_remote_code
        )
    auto_class = class_for(auto_class, config, settings.path)

    def load(path: str, attention: str) -> Any:
        return auto_class.from_pretrained(
            path,
            dtype=dtype_of(settings),
            attn_implementation=attention,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,  # a .bin file is a pickle, which can run code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # _refuse_missing refuses them, each by its name
            **arguments,
        )

    with quiet_transformers(), naming_model(settings.path):
        model, report = load_once(
            settings,
            lambda path: with_attention(partial(load, path), settings.attention),
            is_shared=quantize == "none" and not is_merged,
        )
        take_packed_rows(model, settings.attention)
    if quantize == "4bit":
        _check_widths(model, settings.path)
        keep_four_bits_trainable(model)
    _refuse_missing(settings.path, report, allowed=new_weights)
    return disable_dropout(model)


def class_for(auto_class: Any, config: Any, path: str) -> Any:
    """Return the class that loads this model, or refuse a folder that does not fit `auto_class`."""
    if auto_class is AutoModelForSequenceClassification:
        check_is_known(config, path)
        with quiet_transformers(), naming_model(path):
            return scalar_class(config)
    check_is_policy(config, path)
    return auto_class


def _four_bits(settings: ModelSettings) -> Any:
    """Return settings for NF4 with double quantisation (Dettmers et al. 2023)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(
            "lora.quantize is 4bit, which needs bitsandbytes: pip install bitsandbytes; or give "
            "none"
        )
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype_of(settings),
    )


def _check_widths(model: nn.Module, path: str) -> None:
    """Refuse layers that bitsandbytes 0.50.2 may read wrong on a CPU.

    Its kernel for AVX-512 returns other weights if a row is no whole number of blocks (96, 160).
    """
    for name, module in model.named_modules():
        weight: Any = getattr(module, "weight", None)
        if type(weight).__name__ != "Params4bit" or weight.device.type != "cpu":
            continue
        width = int(module.in_features)
        if width % FOUR_BIT_BLOCK:
            raise ValueError(
                f"lora.quantize is 4bit, and {name} of the model at {path} reads {width} inputs: "
                "on a CPU bitsandbytes can read weights wrong unless this is a multiple of "
                f"{FOUR_BIT_BLOCK}; give lora.quantize none, or run on a GPU"
            )


@contextmanager
def naming_model(path: str) -> Iterator[None]:
    """Name the model in an error that transformers raises in the block."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        place = "" if Path(path).exists() else " (no folder here, so taken for a hub id)"
        name = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise kind(f"cannot load {path}{place}: {name}{error}") from error


def dtype_of(settings: ModelSettings) -> torch.dtype:
    return getattr(torch, settings.dtype)


def check_folder(path: str) -> None:
    """Refuse a path that holds no model. transformers would take a missing folder for a hub id."""
    folder = Path(path)
    if folder.suffix == ".gguf":
        raise ValueError(
            f"{path} is a GGUF file, which no stage reads; convert it with `python -m data.smollm2 "
            f"--gguf {path} --base_dir FOLDER`, and give FOLDER"
        )
    if folder.exists() and not any(
        (folder / name).exists() for name in ("config.json", CONFIG_FILE)
    ):
        raise ValueError(
            f"{path} holds no config.json, so it is not a model folder; run the stage that makes "
            "it, or give the folder that save_pretrained wrote"
        )
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not folder.exists():
        raise ValueError(
            f"the model folder {path} does not exist; run the stage that makes it first, or give "
            "a hub id (owner/name)"
        )
    _refuse_pickles(folder)


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(folder.glob("*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise OSError(
            f"{folder}: {pickles[0].name} is pickled and could run any code, so it is not read; if "
            "you trust whoever made it, convert it: load the model with from_pretrained, then "
            "save_pretrained writes safetensors"
        )


def refuse_no_head(path: str) -> NoReturn:
    raise ValueError(
        f"{path} has no reward head ({HEAD}), so its scores would be random; give the folder that "
        "the rm stage wrote"
    )


def _refuse_missing(path: str, report: dict[str, Any], allowed: Sequence[str]) -> None:
    missing = sorted(set(report["missing_keys"]) - set(allowed))
    mismatched = sorted({entry[0] for entry in report["mismatched_keys"]} - set(allowed))
    if HEAD in missing:
        refuse_no_head(path)
    if missing or mismatched:
        raise ValueError(
            f"{path} does not hold these weights in the right shape: "
            f"{', '.join(sorted({*missing, *mismatched})[:5])}; the folder is incomplete or of "
            "another model"
        )
