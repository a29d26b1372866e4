"""Saves folders that transformers loads as they are."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.inputs.chat import Chat
from rlhf.models.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_of, save_adapter
from rlhf.models.full import quiet_transformers
from rlhf.models.interop import add_version_4_names
from rlhf.models.tokenizers import ends_of
from rlhf.runs.folder import SAVED_WEIGHTS
from rlhf.runs.lineage import BASE_FILE


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a folder that AutoModelForCausalLM and AutoTokenizer load as it is.

    The saved generation_config stops at the end-of-response token and at all end tokens that the
    base model declared. Its sampling settings are dropped, since they would distort later rollouts.

    Args:
        weights: The weights to write if the model holds only a shard of each. None means the
            model's own.
    """
    chat = Chat(tokenizer, ends_of(model.generation_config, tokenizer))
    generation = type(model.generation_config)(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({chat.end_id, *chat.other_ends}),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = generation
    save_model(model, tokenizer, folder, weights)
    generation.save_pretrained(folder)  # saving an adapter does not write it


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Write a model (as `save_weights`) and its tokenizer."""
    with quiet_transformers():
        save_weights(model, folder, weights)
        save_tokenizer(tokenizer, folder)


def save_weights(
    model: PreTrainedModel, folder: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Write the adapter of a model that has one, otherwise all weights with their config.json.

    Args:
        state: The model's state dict if it had to be gathered. None means the model's own.
    """
    folder = Path(folder)
    if adapter_of(model) is not None:
        save_adapter(model, folder, state)
        old = [
            folder / "config.json",
            *(one for name in SAVED_WEIGHTS for one in folder.glob(name)),
        ]
    else:
        model.save_pretrained(folder, state_dict=state)
        old = [folder / name for name in (CONFIG_FILE, WEIGHTS_FILE, BASE_FILE)]
    for path in old:  # files of an earlier run of the other kind would be taken for this one's
        path.unlink(missing_ok=True)
    add_version_4_names(folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write the tokenizer with its chat template, also under names that transformers 4 knows."""
    tokenizer.save_pretrained(folder)
    add_version_4_names(folder)
