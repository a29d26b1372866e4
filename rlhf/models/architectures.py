"""What differs between architectures: the arguments they take, where their body and head are, which
attention they have, and whether a token's probability depends on later tokens.

Nothing here names an architecture: a model is asked, or tried out.
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

NO_POLICY = (
    "WithScore",
    "SequenceClassification",
    "RewardModel",
    "TokenClassification",
    "QuestionAnswering",
)
"""Ends of the names of classes whose weights hold another head than a language model's."""


@functools.cache
def _parameters(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the forward pass of a model has this argument by name."""
    return name in _parameters(type(model).forward)


def accepted(model: nn.Module, **arguments: Any) -> dict[str, Any]:
    """Those of the arguments that the model's forward pass has by name.

    The rest would be dropped in silence by a forward pass with **kwargs, or refused by others.
    """
    return {name: value for name, value in arguments.items() if accepts(model, name)}


def find_body(model: PreTrainedModel) -> PreTrainedModel | None:
    """The model without its head; None where it cannot be told from the whole."""
    if isinstance(model.base_model, PreTrainedModel) and model.base_model is not model:
        return model.base_model
    # base_model is the model itself where its class names a body that it has not, as Llama 4's.
    parts = [part for part in model.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else None


def body_of(model: PreTrainedModel) -> PreTrainedModel:
    """`find_body`.

    Raises:
        ValueError: there is none.
    """
    body = find_body(model)
    if body is None:
        raise ValueError(
            f"{type(model).__name__} does not say where its body is, so no score or value can be "
            "read from it; take another architecture"
        )
    return body


def with_attention(load: Callable[[str], Any], attention: str) -> Any:
    """What `load` gives for this attention, or for eager where the architecture has no sdpa."""
    try:
        return load(attention)
    except ValueError as error:
        if attention != "sdpa" or "scaled_dot_product_attention" not in str(error):
            raise
        return load("eager")


def check_is_policy(config: PretrainedConfig, path: str) -> None:
    """Refuses a folder whose weights are a reward model's or another classifier's.

    Raises:
        ValueError: config.json names such a class, or transformers can make no policy of it.
    """
    check_is_known(config, path)
    for name in config.architectures or ():
        if name.endswith(NO_POLICY):
            raise ValueError(
                f"{path} is a reward model or another classifier (its config.json says {name}), "
                "which writes no text; give the folder of a policy"
            )


def check_is_known(config: PretrainedConfig, path: str) -> None:
    """Raises ValueError where neither transformers nor code in the folder has a causal LM of it."""
    own = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and "AutoModelForCausalLM" not in own:
        raise ValueError(
            f"cannot load {path}: transformers has no causal LM of model_type {config.model_type}; "
            "give a decoder-only model"
        )


@torch.no_grad()
def check_causal(model: PreTrainedModel, path: str) -> None:
    """Refuses a model in which later tokens change what an earlier one is followed by.

    Eight tokens are read twice, with other tokens after them. Such a model would see the token that
    it is to predict, so that its losses and log-probabilities would say nothing.

    Raises:
        ValueError: the two passes differ.
    """
    top = num_embeddings(model) - 1
    ids = torch.tensor([[1 + (7 * i + 3 * j * (i > 7)) % top for i in range(16)] for j in (0, 1)])
    ids = ids.to(model.device)
    try:
        first, second = (features_of(model, input_ids=row)[0, :8].float() for row in ids.split(1))
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"the model at {path} ({type(model).__name__}) cannot read a text of 16 tokens "
            f"({type(error).__name__}: {' '.join(str(error).split())[:200]}); give a model that "
            "needs nothing but text"
        ) from error
    scale = first.abs().max().item()
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.02
    difference = (first - second).abs().max().item()
    if difference > tolerance * max(scale, 1e-6):  # what is no number is told where it is used
        raise ValueError(
            f"the model at {path} ({type(model).__name__}) is bidirectional: what it says of a "
            f"token depends on later tokens (by {difference:.2g} of {scale:.2g}), so it cannot be "
            "trained to write; give a decoder-only model"
        )


def hidden_states(model: PreTrainedModel, **inputs: Tensor | None) -> Tensor:
    """Last hidden states (batch, sequence, model) of a model's body.

    Raises:
        ValueError: as body_of.
    """
    body = body_of(model)
    return body(**inputs, **accepted(body, use_cache=False))[0]


def features_of(model: PreTrainedModel, **inputs: Tensor | None) -> Tensor:
    """What passes are compared by: hidden states, or logits of a policy without a known body."""
    if find_body(model) is not None:
        return hidden_states(model, **inputs)
    return model(**inputs, **accepted(model, use_cache=False)).logits


def num_embeddings(model: PreTrainedModel) -> int:
    """Token ids that the model can both read and write."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, Tensor)
    rows = weight.shape[0]
    head = model.get_output_embeddings()
    return min(rows, head.weight.shape[0]) if isinstance(head, nn.Linear) else rows


def scalar_class(config: PretrainedConfig) -> Any:
    """What makes a scalar model of this config: transformers' sequence classifier where there is
    one with a head `score`, else a class of our own over the body of the causal LM.

    A folder of the latter is read by rlhf.models.loading.load_scalar, and its body by AutoModel;
    the whole has no class in transformers.
    """
    if "AutoModelForSequenceClassification" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForSequenceClassification
    if type(config) not in _scalar_classes:
        _scalar_classes[type(config)] = _find_scalar_class(config)
    return _scalar_classes[type(config)]


def from_config(auto_class: Any, config: PretrainedConfig, **arguments: Any) -> Any:
    """auto_class.from_config, also for a class of `scalar_class`."""
    if isinstance(auto_class, type) and issubclass(auto_class, PreTrainedModel):
        arguments.pop("trust_remote_code", None)
        text = config.get_text_config()
        config = text if auto_class.config_class is type(text) else config
        return auto_class._from_config(config, **arguments)
    return auto_class.from_config(config, **arguments)


_scalar_classes: dict[type, Any] = {}
"""By the class of the config."""


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
    """A causal LM whose unembedding is replaced by a head with one output, `score`."""

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

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, **inputs: Any) -> Tensor:
            """A number for every token (batch, sequence)."""
            return self.score(hidden_states(self, **inputs)).squeeze(-1)

    stem = re.sub(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$", "", causal_class.__name__)
    # Not ...ForSequenceClassification: transformers may have that, with another kind of head.
    Scalar.__name__ = Scalar.__qualname__ = f"{stem}WithScore"
    # transformers leaves out a part of the initialization of classes that are not its own, which
    # buffers outside the files need (Falcon H1's).
    Scalar.__module__ = causal_class.__module__
    return Scalar
