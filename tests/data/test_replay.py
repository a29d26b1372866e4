"""A base model writes documents from where those of its pretraining began."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from data.replay.build import build
from data.replay.config import ReplayConfig
from rlhf.inputs.files import read_records
from rlhf.inputs.records import Text
from rlhf.models.loading import new_policy
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from tests.rlhf.tiny_models import byte_tokenizer

NEXT = {"<doc>": "a", "a": "b", "b": "<doc>", "<end>": "z", "z": "<end>", "<pad>": "<end>"}
"""Maps each token to the one that surely follows. So <doc> begins "ab", and <end> begins "z"."""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer("<end>", "<pad>", "<doc>", eos_token="<end>", pad_token="<pad>")
    architecture = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    model = new_policy(architecture, tokenizer)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()  # attention and the layer's MLP add nothing
        for i, (token, following) in enumerate(NEXT.items()):
            before, after = (tokenizer.convert_tokens_to_ids(name) for name in (token, following))
            model.model.embed_tokens.weight[before, i] = 1.0
            model.lm_head.weight[after, i] = 50.0
    save_policy(model, tokenizer, tmp_path / "base")
    return tmp_path / "base"


def config_of(base: Path, **changes: Any) -> ReplayConfig:
    settings: dict[str, Any] = {"num_texts": 3, "num_texts_held_out": 2, "max_tokens": 8, **changes}
    return ReplayConfig(
        model=ModelSettings(path=str(base)), output_dir=str(base.parent / "replay"), **settings
    )


def texts(config: ReplayConfig, name: str) -> list[str]:
    return [one.text for one in read_records(Path(config.output_dir, name), Text)]


@pytest.mark.parametrize(
    ("document_start", "max_tokens", "text"),
    [("<doc>", 8, "ab"), ("<doc>", 1, "a"), ("<end>", 8, "z"), (None, 8, "z")],
)
def test_documents_follow_their_first_token_to_their_end_or_the_limit(
    base: Path, document_start: str | None, max_tokens: int, text: str
) -> None:
    config = config_of(base, document_start=document_start, max_tokens=max_tokens)
    build(config)
    assert texts(config, "text.jsonl") == [text] * 3
    assert texts(config, "text_held_out.jsonl") == [text] * 2
    results = json.loads(Path(config.output_dir, "results.json").read_text())
    assert results == {"text.jsonl": 3, "text_held_out.jsonl": 2}


@pytest.mark.parametrize(
    ("document_start", "message"),
    [
        ("<pad>", r"5 of 5 documents of .*base are empty; give --document_start the token"),
        ("<|endoftext|>", r"'<\|endoftext\|>' is no special token of the tokenizer, such as <end>"),
    ],
)
def test_a_wrong_first_token_is_refused_and_nothing_is_written(
    base: Path, document_start: str, message: str
) -> None:
    config = config_of(base, document_start=document_start)
    with pytest.raises(ValueError, match=message):
        build(config)
    assert not Path(config.output_dir, "text.jsonl").exists()
