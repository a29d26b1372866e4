"""Defines the reward and value model, which gives one number per token."""

from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.inputs.packing import ModelInput
from rlhf.models.architectures import hidden_states
from rlhf.models.saving import save_model


class ScalarModel(nn.Module):
    """Gives one number per token, from a sequence classifier with one label.

        output = scale * (head(hidden state) - bias)

    It is a reward or a value model. The head computes in fp32, also under autocast. The model is
    saved as the plain classifier; bias and scale are in reward.json.
    """

    def __init__(self, classifier: PreTrainedModel, bias: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.bias = bias
        self.scale = scale

    @property
    def head(self) -> nn.Linear:
        head = self.classifier.score
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, positions: Tensor, **model_inputs: ModelInput) -> Tensor:
        """Return numbers (n,) at `positions` (n,) of the row in `model_inputs` (see PackedRow)."""
        hidden = hidden_states(self.classifier, **model_inputs)
        # A sum of products, because autocast would cast a linear layer's operands to bf16.
        raw = (hidden[0, positions].float() * self.head.weight[0].float()).sum(-1)
        return self.scale * (raw - self.bias)

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Write a folder that load_scalar reads.

        AutoModelForSequenceClassification reads it too, if transformers has a classifier for the
        architecture."""
        save_model(self.classifier, tokenizer, folder)
