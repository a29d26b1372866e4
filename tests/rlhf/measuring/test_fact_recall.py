"""Tests fact recall: matching of whole words, and the share over probes of several lengths."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.inputs.records import Prompt
from rlhf.measuring.fact_recall import fact_recall, starts_with_answer
from stages.pretrain.tokenizer import train_tokenizer

SENTENCES = ["The cup is red.", "The old brown hat is in the barn."]


@pytest.mark.parametrize(
    ("continuation", "answer", "expected"),
    [
        (" oak.", "oak", True),
        ("oak", "oak", True),
        ("\noak and iron", "oak and iron", True),
        ("oaken", "oak", False),
        ("of oak", "oak", False),
        ("", "oak", False),
    ],
)
def test_starts_with_answer(continuation: str, answer: str, expected: bool) -> None:
    assert starts_with_answer(continuation, answer) is expected


def test_recall_is_the_share_of_probes_continued_with_their_answer() -> None:
    tokenizer = train_tokenizer(SENTENCES, 320)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    rows = [torch.tensor([tokenizer(text).input_ids]) for text in SENTENCES]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        sum(model(row, labels=row).loss for row in rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    probes = [
        Prompt(text, {"text": text, "answer": answer})
        for text, answer in (
            ("The cup is", "red"),
            ("The old brown hat is in the", "barn"),
            ("The old brown", "hat"),
            ("The cup is", "blue"),
        )
    ]
    assert fact_recall(model.eval(), tokenizer, probes) == 0.75
    assert fact_recall(model, tokenizer, probes, batch_size=1) == 0.75


def test_probes_without_text_or_answer_are_refused() -> None:
    """They are refused before the model or the tokenizer is used."""
    nobody: Any = None
    with pytest.raises(ValueError, match="no fact probes"):
        fact_recall(nobody, nobody, [])
    with pytest.raises(ValueError, match="fact probe 1"):
        fact_recall(nobody, nobody, [Prompt("x", {"text": "x"})])
