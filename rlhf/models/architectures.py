"""Finds out what differs between architectures.

They differ in the arguments of the forward pass, the places of body and head, the kinds of
attention, and whether a token's probability depends on later tokens. The code here names no
architecture: it inspects the model, or tries it.
"""

import copy
import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf.inputs.packing import ModelInput
from rlhf.models.compat import model_from_config
from rlhf.training.out_of_memory import is_device_error

NO_POLICY = (
    "WithScore",
    "SequenceClassification",
    "RewardModel",
    "TokenClassification",
    "QuestionAnswering",
)
"""Endings of the names of classes that have another head than a language model's."""


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def accepts(model: nn.Module, name: str) -> bool:
    """Return whether the forward pass of a model has an argument of this name."""
    return name in _parameters(type(model).forward)


def accepted(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Return those arguments that the model's forward pass has by name.

    A forward pass with **kwargs would ignore the others without an error; any other would fail.
    """
    return {name: value for name, value in arguments.items() if accepts(model, name)}


def find_body(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return the model without its head; None if no part of it is known to be the body."""
    if isinstance(model.base_model, PreTrainedModel) and model.base_model is not model:
        return model.base_model
    # base_model is the model itself if its class names a body that it lacks, such as Llama 4's.
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else None


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its head, as `find_body`, or raise an error.

    Raises:
        ValueError: The model has no known body.
    """
    body = find_body(model)
    if body is None:
        raise ValueError(
            f"{type(model).__name__} does not say where its body is, so no score or value can be "
            "read from it; take another architecture"
        )
    return body


def layer_configs(config: Any) -> list[Any]:
    """Return the config of each layer.

    Layers may differ in settings such as head_dim (as in Gemma 4). transformers then refuses to
    read these settings from the model's config.
    """
    number = getattr(config, "num_hidden_layers", 0)
    if getattr(config, "is_heterogeneous", False):
        return [config.per_layer_config[i] for i in range(number)]
    return [config] * number


def with_attention(load: Callable[[str], Any], attention: str) -> Any:
    """Return load(attention), or load("eager") if the architecture has no sdpa.

    flex_attention is loaded as sdpa; rlhf.models.packed_attention then gives it its own name.

    Raises:
        ValueError: The attention is flex_attention, and the architecture has no sdpa.
    """
    is_flex = attention == "flex_attention"
    try:
        return load("sdpa" if is_flex else attention)
    except ValueError as error:
        if "scaled_dot_product_attention" not in str(error) or not (is_flex or attention == "sdpa"):
            raise
        if is_flex:
            raise ValueError(
                "attention is flex_attention, which needs what sdpa needs, and this architecture "
                "has no sdpa; set attention to sdpa, which then takes eager"
            ) from error
        return load("eager")


def check_is_policy(config: PretrainedConfig, path: str) -> None:
    """Refuse a folder that holds a reward model or another classifier.

    Raises:
        ValueError: config.json names such a class, or transformers cannot make a policy from it.
    """
    check_is_known(config, path)
    for name in config.architectures or ():
        if name.endswith(NO_POLICY):
            raise ValueError(
                f"{path} is a reward model or another classifier (its config.json says {name}), "
                "which writes no text; give the folder of a policy"
            )


def check_is_known(config: PretrainedConfig, path: str) -> None:
    """Refuse a folder from which no causal LM can be loaded and saved.

    If a model reads more than text, transformers loads and saves only its causal LM.

    Raises:
        ValueError: Neither transformers nor the folder's code has a causal LM for this model type,
            or the causal LM is of a model type that could not be loaded again.
    """
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    causal_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if causal_class is None:
        raise ValueError(
            f"cannot load {path}: transformers has no causal LM of model_type {config.model_type}; "
            "give a decoder-only model"
        )
    saved = causal_class.config_class
    if saved not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"cannot train {path}: transformers saves the causal LM of {config.model_type} as "
            f"model_type {saved.model_type}, which it cannot load again; give a decoder-only model"
        )


@torch.no_grad()
def check_causal(model: PreTrainedModel, path: str) -> None:
    """Refuse a model in which later tokens change the prediction after an earlier one.

    The model reads eight tokens three times: alone, and with two different texts after them. If its
    predictions differ, it sees the token that it should predict, so its losses and
    log-probabilities mean nothing.

    Raises:
        ValueError: The passes differ.
    """
    top = num_embeddings(model) - 1
    # Two texts of 16 ids, equal in the first eight and different after them.
    ids = torch.tensor([[1 + (7 * i + 3 * j * (i > 7)) % top for i in range(16)] for j in (0, 1)])
    first, second = ids.to(model.device).split(1)
    try:
        alone, *continued = (
            _predictions(model, row)[0, :8].float() for row in (first[:, :8], first, second)
        )
        _read_as_in_training(model, first)
    except Exception as error:
        if is_device_error(error):
            raise
        mode = " in training" if model.training else ""
        raise ValueError(
            f"the model at {path} ({type(model).__name__}) cannot read a text of 16 tokens{mode} "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); give a model that "
            "reads texts of any length, and nothing but text"
        ) from error
    scale = alone.abs().max().item()
    # Shares of the largest value, above rounding: bfloat16 keeps 8 bits (0.4 %).
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.02
    difference = max((alone - one).abs().max().item() for one in continued)
    # 1e-6 allows for features that are all 0. A NaN passes here; the code that uses it reports it.
    if difference > tolerance * max(scale, 1e-6):
        raise ValueError(
            f"the model at {path} ({type(model).__name__}) is bidirectional: what it says of a "
            f"token depends on later tokens (by {difference:.2g} of {scale:.2g}), so it cannot be "
            "trained to write; give a decoder-only model"
        )


def _predictions(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Return the logits of a language model, or the features of a classifier."""
    if model.get_output_embeddings() is None:
        return features_of(model, input_ids=ids)
    # Some models pass use_cache to their bodies through **kwargs.
    body = find_body(model)
    cache = accepted(model, use_cache=False) or (accepted(body, use_cache=False) if body else {})
    return model(input_ids=ids, **cache).logits


def _read_as_in_training(model: PreTrainedModel, ids: Tensor) -> None:
    """Read a text in training mode, where some models refuse what they read in evaluation mode."""
    model.train()
    features_of(model, input_ids=ids)
    model.eval()


def hidden_states(model: PreTrainedModel, **inputs: ModelInput) -> Tensor:
    """Return the last hidden states (batch, sequence, model) of a model's body.

    Raises:
        ValueError: As body_of.
    """
    body = body_of(model)
    return body(**inputs, **accepted(body, use_cache=False))[0]


def features_of(model: PreTrainedModel, **inputs: ModelInput) -> Tensor:
    """Return the hidden states, or the logits if the body is unknown, to compare two passes."""
    if find_body(model) is not None:
        return hidden_states(model, **inputs)
    return model(**inputs, **accepted(model, use_cache=False)).logits


def num_embeddings(model: PreTrainedModel) -> int:
    """Return the number of token ids that the model can both read and write."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    rows = weight.shape[0]
    head = model.get_output_embeddings()
    return min(rows, head.weight.shape[0]) if isinstance(head, nn.Linear) else rows


def scalar_class(config: PretrainedConfig) -> Any:
    """Return the class that makes a scalar model from this config.

    It is transformers' sequence classifier if there is one with a head `score`. Otherwise it is a
    class of our own over the body of the causal LM. rlhf.models.loading.load_scalar reads a folder
    of our class; transformers' AutoModel reads only its body.
    """
    if "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForSequenceClassification
    if type(config) not in _scalar_classes:
        _scalar_classes[type(config)] = _find_scalar_class(config)
    return _scalar_classes[type(config)]


def from_config(auto_class: Any, config: PretrainedConfig, **arguments: Any) -> Any:
    """Call auto_class.from_config; also works for a class from `scalar_class`."""
    if isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel):
        arguments.pop("trust_remote_code", None)
        text = config.get_text_config()
        config = text if auto_class.config_class is type(text) else config
        return model_from_config(auto_class, config, **arguments)
    return auto_class.from_config(config, **arguments)


_scalar_classes: dict[type, Any] = {}
"""Cache of `scalar_class`, by the class of the config."""


def _find_scalar_class(config: PretrainedConfig) -> Any:
    found = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(type(config), None)
    if isinstance(found, type) and issubclass(found, GenericForSequenceClassification):
        return AutoModelForSequenceClassification
    config = copy.deepcopy(config)
    with torch.device("meta"):
        if found is not None:
            classifier = AutoModelForSequenceClassification.from_config(config)
            if isinstance(getattr(classifier, "score", None), nn.Linear):
                return AutoModelForSequenceClassification
        return _scalar_over(type(AutoModelForCausalLM.from_config(config)))


def _scalar_over(causal_class: Any) -> Any:
    """Return a causal LM class whose unembedding is replaced by `score`, a head with one output."""

    class Scalar(causal_class):
        def __init__(self, config: PretrainedConfig, *arguments: Any, **settings: Any) -> None:
            super().__init__(config, *arguments, **settings)
            head = super().get_output_embeddings()
            if not isinstance(head, nn.Linear):
                raise ValueError(
                    f"{causal_class.__name__} has no linear output layer, so no head for scores "
                    "can take its place; take another architecture"
                )
            name = next(name for name, module in self.named_modules() if module is head)
            parent, _, child = name.rpartition(".")
            delattr(self.get_submodule(parent), child)
            for ties in ("_tied_weights_keys", "all_tied_weights_keys"):
                pairs = getattr(self, ties, None) or {}
                kept = {one: other for one, other in pairs.items() if not one.startswith(name)}
                setattr(self, ties, kept)
            self.score = nn.Linear(head.in_features, 1, bias=False)

        def _init_weights(self, module: nn.Module) -> None:
            # Some causal LMs initialize their head here, which this class has removed.
            if module is not self:
                super()._init_weights(module)

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, **inputs: Any) -> Tensor:
            """Return a number for every token (batch, sequence)."""
            return self.score(hidden_states(self, **inputs)).squeeze(-1)

    stem = re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", causal_class.__name__)
    # Not ...ForSequenceClassification: transformers may have that class, with another head.
    Scalar.__name__ = Scalar.__qualname__ = f"{stem}WithScore"
    # transformers skips part of the initialization for classes outside its own modules. Buffers
    # that are in no file need that part (Falcon H1's).
    Scalar.__module__ = causal_class.__module__
    return Scalar
