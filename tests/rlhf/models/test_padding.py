"""A score depends on its prompt and response alone, not on padding or on other rows.

Our own passes have no padding. Other users of a saved reward model pad on either side, and must get
the same scores.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.inputs.packing import Layout, Packer, PromptTree
from rlhf.models.loading import load_scalar
from rlhf.models.passes import compute_scores
from rlhf.models.settings import ModelSettings
from tests.rlhf.tiny_models import byte_tokenizer, tiny_scalar_of

PAD, END = 2, 1
TREES = [
    PromptTree((10, 11, 12), ((20, 21, END), (22, END))),
    PromptTree((13,), ((23, 24, 25, 26, 27, END),)),
    PromptTree((14, 15, 16, 17, 18), ((END,), (28, 29, END), (30, 31, 32))),
]
SEQUENCES = [tree.prompt + response for tree in TREES for response in tree.responses]


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    tiny_scalar_of(request.param, vocab_size=len(tokenizer)).save(tmp_path, tokenizer)
    return tmp_path


def ours(
    folder: Path, trees: list[PromptTree], budget: int, layout: Layout = Layout.MASK
) -> torch.Tensor:
    model = load_scalar(ModelSettings(path=str(folder)))
    return compute_scores(model, trees, Packer(budget, layout=layout))


def test_scores_do_not_depend_on_the_company_in_a_row(folder: Path) -> None:
    together = ours(folder, TREES, budget=1000)
    assert together.std() > 0.05
    for other in (
        ours(folder, TREES, budget=10),
        ours(folder, TREES, budget=1000, layout=Layout.ALONE),
        torch.cat([ours(folder, [tree], budget=1000) for tree in TREES]),
        ours(folder, TREES[::-1], budget=1000)[[4, 5, 3, 0, 1, 2]],
    ):
        torch.testing.assert_close(other, together, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("num_pads", [0, 1, 30])
def test_plain_transformers_gives_the_same_scores_with_padding(
    folder: Path, side: str, num_pads: int
) -> None:
    expected = ours(folder, TREES, budget=1000)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    longest = max(map(len, SEQUENCES)) + num_pads
    ids, mask = [], []
    for sequence in SEQUENCES:
        pads = longest - len(sequence)
        real, padding = [1] * len(sequence), [0] * pads
        ids.append([PAD] * pads + [*sequence] if side == "left" else [*sequence] + [PAD] * pads)
        mask.append(padding + real if side == "left" else real + padding)
    attention_mask = torch.tensor(mask)
    with torch.no_grad():
        logits = classifier(
            input_ids=torch.tensor(ids),
            attention_mask=attention_mask,
            # GPT-2 counts positions from the row's start, which would count padding on the left.
            position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
        ).logits
    torch.testing.assert_close(logits.squeeze(1), expected, rtol=0, atol=1e-5)
