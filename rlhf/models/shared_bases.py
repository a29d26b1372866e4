"""Builds several models over one copy of their frozen weights, such as PPO's four roles.

Every role is a module tree with its own adapter and head. The frozen weights in it are the same
Parameter objects as in the other trees. So no adapter is switched on or off: gradients, activation
checkpointing, generation and data parallelism see plain models.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf.models.adapters import HEAD, weights_sha256
from rlhf.models.architectures import body_of, from_config, scalar_class
from rlhf.models.compat import attention_of
from rlhf.models.full import disable_dropout, load_full, quiet_transformers
from rlhf.models.settings import ModelSettings


class SharedBases:
    """Loads each full model once, frozen, for `load_policy` and `load_scalar`.

    Two settings share a model if its SHA-256, type and attention are equal.
    """

    def __init__(self, device: torch.device | str = "cpu", quantize: str = "none") -> None:
        """Start empty. `quantize` is the type of bases that get adapters (see LoraSettings)."""
        self._device = device
        self._quantize = quantize
        self._full: dict[tuple[Any, ...], PreTrainedModel] = {}

    def share(
        self, auto_class: Any, settings: ModelSettings, *, new_weights: Sequence[str], is_base: bool
    ) -> PreTrainedModel:
        """Return a module tree over the weights of a full model, with its own head.

        Args:
            new_weights: As in load_full.
            is_base: Whether an adapter will be added to it.
        """
        quantize = self._quantize if is_base else "none"
        held = (weights_sha256(settings.path), settings.dtype, settings.attention, quantize)
        policy = self._full.get((AutoModelForCausalLM, (), *held))
        if auto_class is AutoModelForSequenceClassification and policy is not None and new_weights:
            classifier = _classifier_on(policy, trust_remote_code=settings.trust_remote_code)
            if classifier is not None:
                return classifier
        key = (auto_class, tuple(new_weights), *held)
        if key not in self._full:
            full = load_full(auto_class, settings, new_weights=new_weights, quantize=quantize)
            self._full[key] = full.requires_grad_(False).to(self._device)
        return _copy_sharing_weights(self._full[key])


def weight_bytes(*models: nn.Module) -> int:
    """Return the bytes of all parameters of these models, counting each storage once."""
    storages = [p.untyped_storage() for model in models for p in model.parameters()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def has_four_bits(model: nn.Module) -> bool:
    """Return whether a model has weights in bitsandbytes' 4 bits, shared or its own.

    A classifier on the body of a quantised policy lacks the usual flag (`is_loaded_in_4bit`).
    """
    return any(type(parameter).__name__ == "Params4bit" for parameter in model.parameters())


def _copy_sharing_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Copy the modules but share their Parameters, except for the head of a classifier."""
    shared = {id(p): p for name, p in model.named_parameters() if name != HEAD}
    return copy.deepcopy(model, shared)


def _classifier_on(policy: PreTrainedModel, *, trust_remote_code: bool) -> PreTrainedModel | None:
    """Build a classifier over a causal LM's body; None if the classifier needs another body."""
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    with quiet_transformers(), torch.device("meta"):
        classifier = from_config(
            scalar_class(config),
            config,
            dtype=policy.dtype,
            attn_implementation=attention_of(policy),
            trust_remote_code=trust_remote_code,
        )
    body, own_body = body_of(_copy_sharing_weights(policy)), body_of(classifier)
    if type(body) is not type(own_body):
        return None
    name = next(name for name, module in classifier.named_modules() if module is own_body)
    width = classifier.score.in_features
    classifier.set_submodule(name, body)
    classifier.score = nn.Linear(width, 1, bias=False, device=policy.device, dtype=policy.dtype)
    return disable_dropout(classifier)
