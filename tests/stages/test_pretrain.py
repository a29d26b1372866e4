"""Tests the pretrain stage: its tokenizer, its rows, its loss, and a short run."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.files import write_records
from rlhf.inputs.records import Prompt, Text
from rlhf.runs.settings import load_config
from rlhf.training.settings import OptimSettings
from stages.pretrain.config import ArchitectureSettings, Config
from stages.pretrain.tokenizer import train_tokenizer
from stages.pretrain.train import draw_batches, language_model_loss, pretrain, to_blocks
from tests.rlhf.plain_loading import load_with_report

TEXTS = [f"The {colour} hat is in the {place}." for colour in ("red", "blue") for place in "ABCDE"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    write_records(folder / "text.jsonl", [Text(text) for text in TEXTS * 8])
    write_records(folder / "held_out.jsonl", [Text(text) for text in TEXTS[:4]])
    probe = Prompt("The red", {"text": "The red", "answer": "hat"})
    write_records(folder / "facts.jsonl", [probe])
    return folder


def make_config(data: Path, output_dir: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "text_path": str(data / "text.jsonl"),
        "text_held_out_path": str(data / "held_out.jsonl"),
        "facts_path": str(data / "facts.jsonl"),
        "output_dir": str(output_dir),
        "vocab_size": 300,
        "block_length": 16,
        "batch_size": 4,
        "num_epochs": 4,
        "eval_steps": 10,
        "architecture": ArchitectureSettings(
            hidden_size=32, num_hidden_layers=1, intermediate_size=64, max_position_embeddings=64
        ),
        "optim": OptimSettings(learning_rate=1e-2),
    }
    return Config(**{**settings, **changes})


@pytest.fixture(scope="module")
def run_dir(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    pretrain(make_config(data, folder))
    return folder


def test_loss_falls_and_the_fact_is_learned(run_dir: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    losses = [
        row["pretrain/held_out_loss"]
        for row in map(json.loads, lines)
        if "pretrain/held_out_loss" in row
    ]
    results = json.loads((run_dir / "results.json").read_text())
    assert losses[-1] < 0.7 * losses[0]
    assert results["held_out_loss"] == pytest.approx(losses[-1])
    assert results["fact_recall"] == 1.0
    assert {"num_parameters", "vocab_size", "num_tokens", "seconds"} <= results.keys()


def test_a_batch_larger_than_the_text_is_told(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain(make_config(data, tmp_path, batch_size=1000, num_epochs=1))
    assert "batch_size is 1000, and the text has" in capsys.readouterr().out


def test_the_folder_loads_with_plain_transformers(run_dir: Path) -> None:
    model, report = load_with_report(AutoModelForCausalLM, run_dir)
    tokenizer = AutoTokenizer.from_pretrained(run_dir)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = tokenizer("The red", return_tensors="pt").input_ids
    text = tokenizer.decode(
        model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
    )
    assert isinstance(text, str)
    assert text.startswith("hat")


def test_same_seed_same_weights_and_another_seed_others(
    data: Path, run_dir: Path, tmp_path: Path
) -> None:
    pretrain(make_config(data, tmp_path / "same"))
    pretrain(make_config(data, tmp_path / "other", seed=1))
    first, same, other = (
        load_file(folder / "model.safetensors")["model.norm.weight"]
        for folder in (run_dir, tmp_path / "same", tmp_path / "other")
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_greedy_text_before_saving_equals_text_after_loading(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[PreTrainedModel] = []

    def keep(model: PreTrainedModel, *_: object) -> float:
        kept.append(model)
        return 0.0

    monkeypatch.setattr("stages.pretrain.train.fact_recall", keep)
    pretrain(make_config(data, tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = AutoTokenizer.from_pretrained(tmp_path)("The blue hat").input_ids
    before, after = (
        generate(
            model,
            [prompt],
            GenerationSettings(),
            Decoding(end_id=5, max_new_tokens=12, temperature=0.0),
        )
        for model in (kept[0], loaded)
    )
    assert before.responses == after.responses
    # Loaded weights have other addresses in memory, so sums may differ by rounding.
    assert after.logprobs[0] == pytest.approx(before.logprobs[0], abs=1e-5)


def test_a_word_has_the_same_id_everywhere_and_text_comes_back() -> None:
    chat = Chat(train_tokenizer(TEXTS, 300))
    hat = chat.response_ids("hat")[0]
    assert chat.response_ids("red hat")[-2] == hat
    assert hat in chat.prompt_ids("hat")
    for text in ("The red hat.", "Zürich, 3 x 4!", "two\nlines"):
        assert chat.decode(chat.response_ids(text)) == text


def test_chat_format_and_document_token() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    chat = Chat(tokenizer)
    ids = chat.prompt_ids(
        [
            {"role": "system", "content": "red"},
            {"role": "user", "content": "hat"},
            {"role": "assistant", "content": "in"},
            {"role": "user", "content": "the"},
        ]
    )
    assert tokenizer.decode(ids) == (
        "<|endoftext|> red Question: hat Reply: in Question: the Answer:"
    )
    assert tokenizer.bos_token == tokenizer.eos_token == "<|endoftext|>"
    assert chat.end_id == tokenizer.eos_token_id != chat.pad_id
    assert chat.text_ids("hat")[0] == tokenizer.bos_token_id


def test_blocks_are_the_documents_joined_in_order() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    blocks = to_blocks(tokenizer, TEXTS, 8)
    stream = [token for text in TEXTS for token in tokenizer(text).input_ids]
    assert blocks.flatten().tolist() == stream[: blocks.numel()]
    assert len(stream) - blocks.numel() < 8
    with pytest.raises(ValueError, match="fewer than block_length 512"):
        to_blocks(tokenizer, TEXTS[:1], 512)


def test_every_epoch_draws_every_row_in_a_new_order() -> None:
    batches = list(draw_batches(num_rows=8, batch_size=4, num_epochs=3, seed=0))
    rows = [row for batch in batches for row in batch]
    assert Counter(rows) == {row: 3 for row in range(8)}
    assert rows[:8] != rows[8:16]


def test_loss_is_the_mean_negative_logprob_of_the_next_token() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    blocks = torch.tensor([[1, 2, 3], [4, 5, 6]])
    with torch.no_grad():
        logprobs = model(blocks).logits.log_softmax(-1)
        by_hand = -sum(logprobs[i, j, blocks[i, j + 1]] for i in range(2) for j in range(2)) / 4
        assert language_model_loss(model, blocks).item() == pytest.approx(by_hand.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_length": 65}, "block_length is 65.*64"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_contradictory_settings_are_refused(
    data: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(data, tmp_path, **changes)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match=r"hidden_size is 30.*num_attention_heads 4"):
        ArchitectureSettings(hidden_size=30)


def test_a_vocabulary_smaller_than_the_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size is 100; give at least 258"):
        train_tokenizer(TEXTS, 100)


def test_shipped_settings_load() -> None:
    config = load_config(Config, ["--config", "configs/pretrain/tiny.yaml"])
    assert config.output_dir == "runs/tiny/base"
