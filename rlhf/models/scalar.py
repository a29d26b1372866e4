"""A model that gives one number a token: a reward or a value model."""

from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.models.architectures import hidden_states
from rlhf.models.saving import save_model


class ScalarModel(nn.Module):
    """One number a token, from a sequence classifier with one label: a reward or a value model.

        output = scale * (head(hidden state) - bias)

    The head reads in fp32, also under autocast. Saved as the plain classifier; bias and scale live
    in reward.json.
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

    def forward(self, positions: Tensor, **model_inputs: Tensor | None) -> Tensor:
        """Numbers (n,) at these positions (n,) of the one row in `model_inputs` (see PackedRow)."""
        hidden = hidden_states(self.classifier, **model_inputs)
        # A sum of products, since autocast would make a linear layer's operands bf16.
        raw = (hidden[0, positions].float() * self.head.weight[0].float()).sum(-1)
        return self.scale * (raw - self.bias)

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
        """Writes a folder that load_scalar reads, and AutoModelForSequenceClassification where
        transformers has a classifier for the architecture."""
        save_model(self.classifier, tokenizer, folder)
