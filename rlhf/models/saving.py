"""Folders that transformers loads as they are."""

from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.inputs.chat import Chat
from rlhf.models.adapters import CONFIG_FILE, WEIGHTS_FILE, adapter_of, save_adapter
from rlhf.models.full import quiet
from rlhf.models.interop import name_as_before
from rlhf.models.tokenizers import ends_of
from rlhf.runs.folder import SAVED_WEIGHTS
from rlhf.runs.lineage import BASE_FILE


def save_policy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """Writes a folder that AutoModelForCausalLM and AutoTokenizer load as it is.

    Generation stops at the end-of-response token by the saved generation_config, and at all ends
    that the base model declared; the sampling settings that it brought along go: they would distort
    later rollouts.

    Args:
        weights: what to write where the model holds a shard of each only; None: the model's own.
    """
    chat = Chat(tokenizer, ends_of(model.generation_config, tokenizer))
    generation = type(model.generation_config)(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted({chat.end_id, *chat.other_ends}),
        pad_token_id=tokenizer.pad_token_id,
    )
    model.generation_config = generation
    save_model(model, tokenizer, folder, weights)
    generation.save_pretrained(folder)  # an adapter's save does not write it


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
) -> None:
    with quiet():
        save_weights(model, folder, weights)
        save_tokenizer(tokenizer, folder)


def save_weights(
    model: PreTrainedModel, folder: str | Path, state: dict[str, Tensor] | None = None
) -> None:
    """Writes the adapter of a model that has one, else all weights with their config.json.

    Args:
        state: the model's state dict, where it had to be gathered; None: its own.
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
    for path in old:  # what an earlier run of the other kind left would be taken for this one
        path.unlink(missing_ok=True)
    name_as_before(folder)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Writes it with its chat template, so that older versions of transformers know it too."""
    tokenizer.save_pretrained(folder)
    name_as_before(folder)
