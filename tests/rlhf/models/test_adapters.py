"""Tests adapters: what they compute, the files that others load, and what is refused."""

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.adapters import find_adapter, weights_sha256
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.passes import compute_scores
from rlhf.models.saving import save_policy
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.models.tokenizers import load_chat
from tests.rlhf.plain_loading import load_with_report
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of, tiny_scalar_of

LORA = LoraSettings(rank=4, alpha=6.0)
IDS = torch.tensor([[5, 9, 13, 17, 21]])
TREES = [PromptTree((3, 4, 5), ((6, 7, 8), (9, 10)))]


def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer("<eos>", "<pad>", eos_token="<eos>", pad_token="<pad>")


def save_base(folder: Path, architecture: str = "llama", **changes: Any) -> ModelSettings:
    model = tiny_policy_of(architecture, vocab_size=len(tokenizer()), **changes)
    save_policy(model, tokenizer(), folder)
    return ModelSettings(path=str(folder))


def train_a_little(model: nn.Module) -> None:
    """Change every trained weight, including B, which starts at 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def save_adapter_over(base: ModelSettings, folder: Path) -> tuple[PreTrainedModel, ModelSettings]:
    policy = load_policy(base, LORA)
    train_a_little(policy)
    save_policy(policy, tokenizer(), folder)
    return policy, ModelSettings(path=str(folder))


def save_scalar_over(base: ModelSettings, folder: Path) -> tuple[ScalarModel, ModelSettings]:
    torch.manual_seed(0)
    model = load_scalar(base, new_head=True, lora=LORA)
    train_a_little(model)
    model.save(folder, tokenizer())
    return model, ModelSettings(path=str(folder))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


@pytest.fixture
def base(tmp_path: Path) -> ModelSettings:
    return save_base(tmp_path / "base")


# What it computes --------------------------------------------------------------------------------


def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(base: ModelSettings) -> None:
    full, model = load_policy(base), load_policy(base, LORA)
    torch.testing.assert_close(logits(model), logits(full), rtol=0, atol=1e-5)
    trained = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    layers = [m for n, m in full.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    assert len(layers) == 14  # q, k, v, o, gate, up and down in two blocks
    assert sum(map(math.prod, trained.values())) == sum(4 * sum(m.weight.shape) for m in layers)
    train_a_little(model)
    assert (logits(model) - logits(full)).abs().max() > 0.1


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "opt", "qwen3"])
@pytest.mark.slow
def test_saved_adapter_is_what_anybody_computes(architecture: str, tmp_path: Path) -> None:
    """Ours equals it merged, in transformers, in PEFT, and as W + alpha / rank * B A below."""
    base = save_base(tmp_path / "base", architecture)
    live, settings = save_adapter_over(base, tmp_path / "adapter")
    expected = logits(live)
    plain = load_policy(base)
    by_hand = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with torch.no_grad():
        for name in [name for name in by_hand if "lora_A" in name]:
            b = by_hand[name.replace("lora_A", "lora_B")]
            change = 6.0 / 4 * b @ by_hand[name]
            layer = plain.get_submodule(
                name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            )
            is_linear = isinstance(layer, nn.Linear)  # GPT-2's Conv1D holds the transpose
            layer.get_parameter("weight").add_(change if is_linear else change.T)
    for other in (
        plain,
        load_policy(settings),
        load_policy(settings, LORA),
        AutoModelForCausalLM.from_pretrained(settings.path),
        AutoPeftModelForCausalLM.from_pretrained(settings.path),
    ):
        torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-5)


def test_adapter_folder_is_whole_and_plain(base: ModelSettings, tmp_path: Path) -> None:
    save_adapter_over(base, tmp_path / "adapter")
    folder = tmp_path / "adapter"
    assert {path.name for path in folder.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base.json",
        "chat_template.jinja",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template
        == load_chat(base).tokenizer.chat_template
    )
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [0]
    weights = load_file(folder / "adapter_model.safetensors")
    assert len(weights) == 28 and all(weight.numel() for weight in weights.values())


def test_all_weights_of_a_merged_adapter_are_trained(base: ModelSettings, tmp_path: Path) -> None:
    _, settings = save_adapter_over(base, tmp_path / "adapter")
    merged = load_policy(settings)
    assert {name for name, _ in merged.named_parameters()} == {
        name for name, _ in load_policy(base).named_parameters()
    }
    assert all(parameter.requires_grad for parameter in merged.parameters())
    save_policy(merged, tokenizer(), tmp_path / "full")
    again, report = load_with_report(AutoModelForCausalLM, tmp_path / "full")
    assert not any(report.values()), report
    torch.testing.assert_close(logits(again), logits(merged), rtol=0, atol=1e-5)


def test_adapters_are_trained_in_fp32_over_bfloat16(base: ModelSettings) -> None:
    model = load_policy(ModelSettings(path=base.path, dtype="bfloat16"), LORA)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert logits(model).dtype == torch.bfloat16


def test_gradient_checkpointing_changes_no_gradient(base: ModelSettings) -> None:
    found = []
    for is_checkpointed in (False, True):
        torch.manual_seed(0)
        model = load_policy(base, LORA)
        train_a_little(model)
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        model(input_ids=IDS).logits.square().sum().backward()
        parameters = [p for p in model.parameters() if p.requires_grad]
        found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]))
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert found[0].norm() > 1 and len(found[0]) == sum(p.numel() for p in parameters)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_named_layers_alone_get_an_adapter(base: ModelSettings) -> None:
    model = load_policy(base, LoraSettings(rank=2, target_modules=["q_proj", "v_proj"]))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 2
    assert all(".q_proj." in name or ".v_proj." in name for name in trained)
    with pytest.raises(ValueError, match=r"names lm_head, qproj; the linear layers.* down_proj, "):
        load_policy(base, LoraSettings(rank=2, target_modules=["lm_head", "qproj", "v_proj"]))


# Reward models -----------------------------------------------------------------------------------


def test_reward_model_takes_the_policys_adapter_and_trains_it_on(
    base: ModelSettings, tmp_path: Path
) -> None:
    policy, settings = save_adapter_over(base, tmp_path / "sft")
    model = load_scalar(settings, new_head=True, lora=LORA)
    hidden = [one.base_model(input_ids=IDS)[0] for one in (policy, model.classifier)]
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-5)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(names) == 28 + 1 and "classifier.score.weight" in names


def test_scores_are_the_same_when_loaded_under_another_seed(
    base: ModelSettings, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    full = load_scalar(base, new_head=True)
    train_a_little(full)
    full.save(tmp_path / "full", tokenizer())
    live, settings = save_scalar_over(base, tmp_path / "adapter")
    load_scalar(settings).save(tmp_path / "merged", tokenizer())
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    paths = [str(tmp_path / name) for name in ("full", "adapter", "merged")]
    torch.manual_seed(123)
    loaded = [load_scalar(ModelSettings(path=path)) for path in paths]
    found = torch.stack([compute_scores(model, TREES, Packer(64)) for model in loaded])
    of_full, of_live = (compute_scores(model, TREES, Packer(64)) for model in (full, live))
    assert (of_full - of_live).abs().max() > 0.1
    expected = torch.stack([of_full, of_live, of_live])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    batch = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 4, 5, 9, 10, 1]])
    for auto_class in (AutoModelForSequenceClassification, AutoPeftModelForSequenceClassification):
        model = auto_class.from_pretrained(settings.path, num_labels=1).eval()
        model.config.pad_token_id = 1
        with torch.no_grad():
            raw = model(input_ids=batch, attention_mask=(batch != 1).long()).logits.squeeze(-1)
        torch.testing.assert_close(raw, of_live, rtol=0, atol=1e-5)


def test_reward_models_adapter_is_no_policy_and_a_policys_has_no_head(
    base: ModelSettings, tmp_path: Path
) -> None:
    _, of_policy = save_adapter_over(base, tmp_path / "sft")
    _, of_reward = save_scalar_over(of_policy, tmp_path / "rm")
    with pytest.raises(ValueError, match="rm is the adapter of a reward model"):
        load_policy(of_reward)
    with pytest.raises(ValueError, match=r"sft has no reward head \(score\.weight\)"):
        load_scalar(of_policy)


# What is refused ---------------------------------------------------------------------------------


def test_weights_hash_is_that_of_cat_and_sha256sum(tmp_path: Path) -> None:
    for name, content in (("b.safetensors", b"two"), ("a.safetensors", b"one"), ("c.json", b"x")):
        (tmp_path / name).write_bytes(content)
    assert weights_sha256(str(tmp_path)) == hashlib.sha256(b"onetwo").hexdigest()
    (tmp_path / "a.safetensors").write_bytes(b"three")
    assert weights_sha256(str(tmp_path)) == hashlib.sha256(b"threetwo").hexdigest()
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"holds no \*\.safetensors file"):
        weights_sha256(str(tmp_path))


def test_another_base_is_refused_with_both_hashes(base: ModelSettings, tmp_path: Path) -> None:
    _, settings = save_adapter_over(base, tmp_path / "adapter")
    before = weights_sha256(base.path)
    save_policy(load_policy(settings), tokenizer(), base.path)
    after = weights_sha256(base.path)
    message = f"adapter over weights with SHA-256 {before}.*{base.path} has {after}"
    for load in (load_policy, lambda s: load_scalar(s, new_head=True)):
        with pytest.raises(ValueError, match=message):
            load(settings)


def test_base_that_is_gone_or_an_adapter_is_named(base: ModelSettings, tmp_path: Path) -> None:
    _, settings = save_adapter_over(base, tmp_path / "adapter")
    Path(base.path).rename(tmp_path / "elsewhere")
    message = f"{settings.path} is an adapter without its base: {base.path} is not a folder here"
    with pytest.raises(OSError, match=message):
        load_policy(settings)
    (tmp_path / "adapter").rename(base.path)
    with pytest.raises(ValueError, match=f"{base.path} is an adapter itself"):
        find_adapter(base.path) and load_policy(ModelSettings(path=base.path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 8}, r"lora\.rank is 8, but .*adapter holds an adapter with 4"),
        ({"alpha": 16.0}, r"lora\.alpha is 16\.0, but .* with 6\.0"),
        ({"target_modules": ["q_proj"]}, r"lora\.target_modules is \['q_proj'\], but .*down_proj"),
    ],
)
def test_settings_of_another_adapter_are_refused(
    changes: dict[str, Any], message: str, base: ModelSettings, tmp_path: Path
) -> None:
    _, settings = save_adapter_over(base, tmp_path / "adapter")
    wanted = LoraSettings(**{"rank": 4, "alpha": 6.0, **changes})
    with pytest.raises(ValueError, match=message):
        load_policy(settings, wanted)


def test_adapter_made_elsewhere_is_loaded_with_a_warning(
    base: ModelSettings, tmp_path: Path
) -> None:
    live, settings = save_adapter_over(base, tmp_path / "adapter")
    (tmp_path / "adapter" / "base.json").unlink()
    with pytest.warns(UserWarning, match=r"adapter holds no base\.json, so nobody can tell"):
        loaded = load_policy(settings)
    torch.testing.assert_close(logits(loaded), logits(live), rtol=0, atol=1e-5)


def adapter_with(changes: dict[str, Any], base: ModelSettings, folder: Path) -> ModelSettings:
    """Write an adapter over the base, with other values in its adapter_config.json."""
    _, settings = save_adapter_over(base, folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3' and not LORA"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"megatron_core": "os"}, "megatron_core is 'os'"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"r": 0}, "r is 0"),
        ({"r": "4"}, "r is '4'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"target_modules": ".*"}, r"target_modules is '\.\*'"),
        ({"target_modules": []}, r"target_modules is empty"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is None"),
    ],
)
def test_adapter_with_more_to_it_is_refused(
    changes: dict[str, Any], message: str, base: ModelSettings, tmp_path: Path
) -> None:
    settings = adapter_with(changes, base, tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"adapter_config.json is not a LoRA adapter.*{message}"):
        load_policy(settings)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["wings"]}, r"Target modules \{'wings'\}"),
        ({"r": 10**30}, "TypeError"),
        ({"r": 3}, "does not fit"),
    ],
)
def test_adapter_that_fits_no_layer_is_refused_by_its_name(
    changes: dict[str, Any], message: str, base: ModelSettings, tmp_path: Path
) -> None:
    settings = adapter_with(changes, base, tmp_path / "adapter")
    with pytest.raises(ValueError, match=f"cannot load {settings.path}: .*({message})"):
        load_policy(settings)


def test_files_that_are_cut_or_missing_are_named(base: ModelSettings, tmp_path: Path) -> None:
    _, settings = save_adapter_over(base, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    gone, *kept = sorted(weights)
    save_file({name: weights[name] for name in kept}, file)
    with pytest.raises(ValueError, match=f"does not fit .*base at {gone}: weights are missing"):
        load_policy(settings)
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        load_policy(settings)
    file.unlink()
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors cannot be read"):
        load_policy(settings)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is not a LoRA adapter"):
        load_policy(settings)


def test_four_bits_need_a_package_and_a_rank(
    base: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="quantize is 4bit and rank is 0"):
        LoraSettings(quantize="4bit")
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install bitsandbytes"):
        load_policy(base, LoraSettings(rank=4, quantize="4bit"))


def test_what_an_earlier_run_left_is_not_taken_for_this_one(
    base: ModelSettings, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    full = load_policy(base)
    save_policy(full, tokenizer(), folder)
    live, settings = save_adapter_over(base, folder)
    assert not (folder / "model.safetensors").exists() and not (folder / "config.json").exists()
    torch.testing.assert_close(logits(load_policy(settings)), logits(live), rtol=0, atol=1e-5)
    save_policy(full, tokenizer(), folder)
    torch.testing.assert_close(logits(load_policy(settings)), logits(full), rtol=0, atol=1e-5)
    assert packer_for(load_policy(settings), 64).shares_prompts
    tiny_scalar_of("llama", vocab_size=258).save(folder, tokenizer())
    assert find_adapter(str(folder)) is None
