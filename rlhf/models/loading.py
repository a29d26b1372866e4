"""Loads policies (causal LMs) and scalar models, with or without an adapter."""

from dataclasses import replace
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.models.adapters import (
    HEAD,
    Adapter,
    check_same,
    find_adapter,
    load_adapter,
    merge_adapter,
    new_adapter,
)
from rlhf.models.architectures import check_causal
from rlhf.models.full import disable_dropout, load_full, naming_model, refuse_no_head
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import NO_LORA, LoraSettings, ModelSettings
from rlhf.models.shared_bases import SharedBases
from rlhf.models.tokenizers import load_tokenizer


def load_policy(
    settings: ModelSettings, lora: LoraSettings = NO_LORA, bases: SharedBases | None = None
) -> PreTrainedModel:
    """Load a causal LM in evaluation mode with dropout off and every weight from its files.

    Args:
        lora: With a rank, the model has a trainable adapter over frozen weights: the folder's own,
            or a new one if the folder holds a full model. With rank 0, all weights can be trained,
            and an adapter is merged into its base.
        bases: Holds frozen weights for several models. With it and rank 0, the model is frozen and
            its adapter is not merged.

    Raises:
        ValueError: Weights are missing or do not fit the architecture, an adapter's base has other
            weights than in its training, or `lora` asks for another adapter.
        OSError: The folder or the hub id cannot be read.
    """
    adapter = find_adapter(settings.path)
    if adapter is not None and adapter.has_head:
        raise ValueError(
            f"{settings.path} is the adapter of a reward model; give the folder of a policy"
        )
    model = _load_base(AutoModelForCausalLM, settings, adapter, lora, bases)
    _adapt(model, settings.path, adapter, lora, is_shared=bases is not None)
    check_causal(model, settings.path)
    return model


def new_policy(architecture: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Make a causal LM with random weights from torch's generator.

    Args:
        architecture: Arguments of transformers' config with `model_type`, for example
            {"model_type": "llama", "hidden_size": 128, ...}. The vocabulary and the special tokens
            come from the tokenizer.
    """
    settings = dict(architecture)
    model_type = settings.pop("model_type")
    config = AutoConfig.for_model(
        model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **settings,
    )
    return disable_dropout(AutoModelForCausalLM.from_config(config))


def load_scalar(
    settings: ModelSettings,
    *,
    new_head: bool = False,
    lora: LoraSettings = NO_LORA,
    bases: SharedBases | None = None,
) -> ScalarModel:
    """Load a scalar model in evaluation mode with dropout off.

    Args:
        new_head: True puts a new head from torch's generator on the body of any causal LM. Its
            weights are N(0, 1/(d+1)), so that first scores are of order 1 (Stiennon et al. 2020,
            B.1). False needs the head in the folder.
        lora: As in load_policy. With a rank, the head is trained together with the adapter.
        bases: As in load_policy.

    Raises:
        ValueError: The head is missing and `new_head` is False; or as in load_policy.
    """
    path = settings.path
    adapter = find_adapter(path)
    if adapter is not None and not (adapter.has_head or new_head):
        refuse_no_head(path)
    classifier = _load_base(
        AutoModelForSequenceClassification, settings, adapter, lora, bases, new_head=new_head
    )
    tokenizer = load_tokenizer(path, trust_remote_code=settings.trust_remote_code)
    classifier.config.pad_token_id = tokenizer.pad_token_id
    _adapt(classifier, path, adapter, lora, is_shared=bases is not None, new_head=new_head)
    check_causal(classifier, path)
    model = ScalarModel(classifier)
    if new_head:
        nn.init.normal_(model.head.weight, std=(model.head.in_features + 1) ** -0.5)
    return model


def _load_base(
    auto_class: Any,
    settings: ModelSettings,
    adapter: Adapter | None,
    lora: LoraSettings,
    bases: SharedBases | None,
    *,
    new_head: bool = False,
) -> Any:
    """Load the base of a folder's adapter, or the folder's own full model."""
    if adapter is not None:
        settings = replace(settings, path=adapter.base)
    has_own_head = new_head or (adapter is not None and adapter.has_head)
    is_classifier = auto_class is AutoModelForSequenceClassification
    new_weights = (HEAD,) if is_classifier and has_own_head else ()
    if bases is not None:
        is_base = adapter is not None or lora.rank > 0
        return bases.share(auto_class, settings, new_weights=new_weights, is_base=is_base)
    return load_full(
        auto_class,
        settings,
        new_weights=new_weights,
        quantize=lora.quantize,
        is_merged=adapter is not None and not lora.rank,
    )


def _adapt(
    model: PreTrainedModel,
    path: str,
    adapter: Adapter | None,
    lora: LoraSettings,
    *,
    is_shared: bool,
    new_head: bool = False,
) -> None:
    """Add the adapter to its base, as `load_policy` describes."""
    if adapter is None and lora.rank:
        new_adapter(model, path, lora)
    elif adapter is not None:
        if lora.rank:
            check_same(path, adapter, lora)
        with naming_model(path):
            load_adapter(model, path, adapter, new_head=new_head)
        if not (lora.rank or is_shared):
            merge_adapter(model)
    if is_shared and not lora.rank:
        model.requires_grad_(False)
