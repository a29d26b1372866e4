"""Makes models without weights from their config; under FakeTensorMode they take no memory."""

from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from rlhf.models.adapters import CONFIG_FILE, check_same, empty_adapter, read_adapter
from rlhf.models.architectures import from_config, with_attention
from rlhf.models.full import check_folder, class_for, disable_dropout, dtype_of, naming_model
from rlhf.models.heads import record_plain_head
from rlhf.models.packed_attention import take_packed_rows
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import NO_LORA, LoraSettings, ModelSettings


def empty_policy(
    settings: ModelSettings, lora: LoraSettings = NO_LORA, *, is_shared: bool = False
) -> PreTrainedModel:
    """Make the causal LM that load_policy would return, from its config alone.

    Args:
        is_shared: Whether load_policy would get `bases`.

    Raises:
        ValueError, OSError: The config cannot be read, or `lora` asks for another adapter.
    """
    model = _empty(AutoModelForCausalLM, settings, lora, is_shared)
    record_plain_head(model)
    return model


def empty_scalar(
    settings: ModelSettings, lora: LoraSettings = NO_LORA, *, is_shared: bool = False
) -> ScalarModel:
    """Make the scalar model that load_scalar would return; see `empty_policy`."""
    auto_class = AutoModelForSequenceClassification
    return ScalarModel(_empty(auto_class, settings, lora, is_shared, num_labels=1))


def _empty(
    auto_class: Any, settings: ModelSettings, lora: LoraSettings, is_shared: bool, **arguments: Any
) -> Any:
    path, adapter = settings.path, None
    if (Path(path) / CONFIG_FILE).is_file():
        adapter = read_adapter(path)
        path = adapter.base
    else:
        check_folder(path)
    with naming_model(settings.path):
        config = AutoConfig.from_pretrained(
            path, trust_remote_code=settings.trust_remote_code, **arguments
        )
        auto_class = class_for(auto_class, config, settings.path)
        model = with_attention(
            lambda attention: from_config(
                auto_class,
                config,
                dtype=dtype_of(settings),
                attn_implementation=attention,
                trust_remote_code=settings.trust_remote_code,
            ),
            settings.attention,
        )
        take_packed_rows(model, settings.attention)
    if adapter is not None and lora.rank:
        check_same(settings.path, adapter, lora)
    if lora.rank or (adapter is not None and is_shared):
        empty_adapter(model, path, lora, adapter)
    if is_shared and not lora.rank:
        model.requires_grad_(False)
    return disable_dropout(model)
