"""Merged weights compute the same as the adapter, load anywhere, and overwrite nothing."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.adapters import weights_sha256
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.passes import compute_scores
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from tests.rlhf.plain_loading import load_with_report
from tests.rlhf.tiny_models import byte_tokenizer, change_trained, tiny_policy_of
from tools.export.config import Config
from tools.export.export import TOLERANCE, export

LORA = LoraSettings(rank=4)
IDS = torch.tensor([[5, 9, 13, 17, 21]])


@pytest.fixture(params=["llama", "gpt2"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Save a base and its tokenizer."""
    tokenizer = byte_tokenizer("<eos>", "<pad>", eos_token="<eos>", pad_token="<pad>")
    base = tiny_policy_of(request.param, vocab_size=len(tokenizer))
    save_policy(base, tokenizer, tmp_path / "base")
    return tmp_path


def test_merged_policy_has_the_live_ones_logits(work: Path) -> None:
    settings = ModelSettings(path=str(work / "base"))
    live = load_policy(settings, LORA)
    change_trained(live)
    save_policy(live, AutoTokenizer.from_pretrained(settings.path), work / "ppo")
    export(Config(folder=str(work / "ppo"), output_dir=str(work / "merged")))
    merged, report = load_with_report(AutoModelForCausalLM, work / "merged")
    assert not any(report.values()), report
    with torch.no_grad():
        expected, base = live(input_ids=IDS).logits, load_policy(settings)(input_ids=IDS).logits
        found = merged(input_ids=IDS).logits
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    templates = [AutoTokenizer.from_pretrained(work / n).chat_template for n in ("ppo", "merged")]
    assert templates[0] == templates[1] is not None
    source = json.loads((work / "merged" / "lineage.json").read_text())["inputs"]["folder"]
    assert source["path"] == str(work / "ppo")
    assert source["base"]["sha256"] == weights_sha256(settings.path)
    assert "adapter_model.safetensors" in source["sha256"]
    assert not (work / "merged" / "adapter_config.json").exists()


def test_merged_reward_model_has_the_same_scores_and_card(work: Path) -> None:
    live = load_scalar(ModelSettings(path=str(work / "base")), new_head=True, lora=LORA)
    change_trained(live)
    live.save(work / "rm", AutoTokenizer.from_pretrained(work / "base"))
    (work / "rm" / "reward.json").write_text('{"bias": 0.5}')
    export(Config(folder=str(work / "rm"), output_dir=str(work / "merged")))
    merged = load_scalar(ModelSettings(path=str(work / "merged")))
    trees = [PromptTree((3, 4, 5), ((6, 7, 8), (9, 10)))]
    expected, found = (compute_scores(model, trees, Packer(64)) for model in (live, merged))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (work / "merged" / "reward.json").read_text() == '{"bias": 0.5}'
    _, report = load_with_report(AutoModelForSequenceClassification, work / "merged")
    assert not any(report.values()), report


def test_nothing_is_overwritten_and_there_must_be_an_adapter(work: Path) -> None:
    live = load_policy(ModelSettings(path=str(work / "base")), LORA)
    save_policy(live, AutoTokenizer.from_pretrained(work / "base"), work / "ppo")
    (work / "taken").mkdir()
    (work / "taken" / "notes.txt").write_text("mine")
    with pytest.raises(
        ValueError, match=r"output_dir .*taken holds notes.txt, which this program did not"
    ):
        export(Config(folder=str(work / "ppo"), output_dir=str(work / "taken")))
    assert [path.name for path in (work / "taken").iterdir()] == ["notes.txt"]
    with pytest.raises(
        ValueError, match=r"base holds no adapter \(adapter_config\.json\) and no checkpoint"
    ):
        export(Config(folder=str(work / "base"), output_dir=str(work / "merged")))
    assert not (work / "merged").exists()


def test_weights_that_a_coarse_type_cannot_hold_are_refused(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = load_policy(ModelSettings(path=str(work / "base")), LORA)
    change_trained(live)
    save_policy(live, AutoTokenizer.from_pretrained(work / "base"), work / "ppo")
    monkeypatch.setitem(TOLERANCE, "bfloat16", 1e-6)
    with pytest.raises(ValueError, match=r"merged weights differ .* more than 1e-06 \(bfloat16\)"):
        export(Config(folder=str(work / "ppo"), output_dir=str(work / "merged"), dtype="bfloat16"))
    assert not (work / "merged").exists()
