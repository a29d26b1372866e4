"""What was saved loads again, here and elsewhere; also tests heads and dropout."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.loading import load_policy, load_scalar, new_policy
from rlhf.models.passes import compute_scores
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_chat, load_tokenizer
from tests.rlhf.plain_loading import load_with_report
from tests.rlhf.tiny_models import (
    ARCHITECTURES,
    byte_tokenizer,
    tiny_policy_of,
    tiny_scalar_of,
)

Loader = Callable[[ModelSettings], object]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TREES = [PromptTree((3, 4, 5), ((6, 7, 8), (9, 10)))]


def tokenizer_of(*, chatml: bool = False) -> PreTrainedTokenizerBase:
    special = ("<eos>", "<pad>", "<|im_start|>", "<|im_end|>")
    template = CHATML if chatml else None
    return byte_tokenizer(*special, eos_token="<eos>", pad_token="<pad>", chat_template=template)


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Save a policy as a stage does. Llama's unembedding is its own, GPT-2's is tied."""
    tokenizer = tokenizer_of()
    model = tiny_policy_of(request.param, vocab_size=len(tokenizer))
    path = tmp_path / "policy"
    save_policy(model, tokenizer, path)
    return path


def greedy(model: Any, length: int = 10) -> list[int]:
    prompt = torch.tensor([[65, 70, 75]])
    ids = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=length
    )
    return ids[0].tolist()


# Round trips -------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox", "qwen3", "opt", "mistral"])
def test_saved_policy_loads_anywhere(architecture: str, tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    model = tiny_policy_of(architecture, vocab_size=len(tokenizer))
    save_policy(model, tokenizer, tmp_path)
    loaded, report = load_with_report(AutoModelForCausalLM, tmp_path)
    assert not any(report.values()), report
    assert greedy(loaded) == greedy(model)
    ours = load_policy(ModelSettings(path=str(tmp_path)))
    assert greedy(ours) == greedy(model)
    assert not ours.training
    expected = model.state_dict()
    assert ours.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in ours.state_dict().items())
    text = "Who?\n\nĀ"
    assert load_tokenizer(str(tmp_path))(text).input_ids == tokenizer(text).input_ids


def test_saved_policy_stops_at_the_end_of_a_response(tmp_path: Path) -> None:
    tokenizer = tokenizer_of(chatml=True)
    model = tiny_policy_of("llama", vocab_size=len(tokenizer))
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.3, top_p=0.5, repetition_penalty=1.3, eos_token_id=9
    )
    save_policy(model, tokenizer, tmp_path)
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == [0, 3, 9], "the base's own end stays"
    assert generation.pad_token_id == 1
    assert load_chat(ModelSettings(path=str(tmp_path))).other_ends == (0, 9)
    for name in ("do_sample", "temperature", "top_p", "repetition_penalty"):
        assert getattr(generation, name) == getattr(GenerationConfig(), name)
    assert "0.3" not in (tmp_path / "generation_config.json").read_text()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == CHATML


def test_ends_that_only_an_architecture_has_by_default_are_none(tmp_path: Path) -> None:
    """Llama's config has token 2 by default, which is a letter here."""
    tokenizer = tokenizer_of(chatml=True)
    letter = len(tokenizer) - 1
    model = tiny_policy_of("llama", vocab_size=len(tokenizer), eos_token_id=letter)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == letter
    assert load_chat(ModelSettings(path=str(tmp_path))).other_ends == (0,)
    save_policy(load_policy(ModelSettings(path=str(tmp_path))), tokenizer, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [0, 3]


def test_saved_scalar_model_loads_anywhere(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    model = tiny_scalar_of("gpt2", vocab_size=len(tokenizer), pad_token_id=1)
    model.save(tmp_path, tokenizer)
    loaded, report = load_with_report(AutoModelForSequenceClassification, tmp_path)
    assert not any(report.values()), report
    ours = load_scalar(ModelSettings(path=str(tmp_path)))
    torch.testing.assert_close(ours.head.weight, model.head.weight)
    scores = compute_scores(model, TREES, Packer(64))
    with torch.no_grad():
        # The classifier of transformers knows neither bias nor scale, and finds the end by itself.
        batch = torch.tensor([[3, 4, 5, 6, 7, 8], [3, 4, 5, 9, 10, 1]])
        raw = loaded(input_ids=batch, attention_mask=(batch != 1).long()).logits.squeeze(-1)
    torch.testing.assert_close(0.5 * (raw - 0.3), scores, rtol=0, atol=1e-5)


def test_bfloat16(folder: Path) -> None:
    policy = load_policy(ModelSettings(path=str(folder), dtype="bfloat16"))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.bfloat16}
    scalar = load_scalar(ModelSettings(path=str(folder), dtype="bfloat16"), new_head=True)
    assert compute_scores(scalar, TREES, Packer(64)).dtype == torch.float32


def test_the_head_reads_in_fp32_under_autocast(folder: Path) -> None:
    """In bf16, neighbouring numbers near 4 are 0.03 apart."""
    scalar = load_scalar(ModelSettings(path=str(folder)), new_head=True)
    scalar.head.weight.data.mul_(8)
    row = Packer(64).rows(TREES)[0]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        body = scalar.classifier.base_model(**row.model_inputs, use_cache=False)
        values = scalar(row.predictors, **row.model_inputs)
    features = body.last_hidden_state[0, row.predictors].double()
    expected = (features @ scalar.head.weight[0].double()).float()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_attention_is_the_settings(folder: Path) -> None:
    policy = load_policy(ModelSettings(path=str(folder), attention="eager"))
    assert policy.config._attn_implementation == "eager"


# What cannot be loaded ---------------------------------------------------------------------------


@pytest.fixture(params=[load_policy, load_scalar, load_chat])
def load(request: pytest.FixtureRequest) -> Loader:
    return request.param


def test_no_such_folder(load: Loader, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no/such/run does not exist; run the stage"):
        load(ModelSettings(path="no/such/run"))
    with pytest.raises(ValueError, match="does not exist"):
        load(ModelSettings(path=str(tmp_path / "missing")))


def test_folder_without_config(load: Loader, folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load(ModelSettings(path=str(folder)))


@pytest.mark.parametrize("load_model", [load_policy, load_scalar])
def test_folder_without_weights(load_model: Loader, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"cannot load .*policy: .*no file named model\.safetensors"):
        load_model(ModelSettings(path=str(folder)))


def test_hub_id_without_network(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for name in ("nobody/nothing", "nothing"):
        with pytest.raises(OSError, match=rf"cannot load {name} .*taken for a hub id"):
            load(ModelSettings(path=name))


def keep_weights(folder: Path, keep: Callable[[str], bool]) -> None:
    file = folder / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if keep(name)}
    save_file(weights, file, metadata={"format": "pt"})


def test_missing_weight_is_named(folder: Path) -> None:
    keep_weights(folder, lambda name: ".1." not in name)
    with pytest.raises(ValueError, match=r"does not hold these weights.*\.1\."):
        load_policy(ModelSettings(path=str(folder)))
    with pytest.raises(ValueError, match=r"does not hold these weights.*\.1\."):
        load_scalar(ModelSettings(path=str(folder)), new_head=True)


def test_weights_of_another_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] += 5
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"not hold these weights in the right shape.*(wte|embed_)"
    ):
        load_policy(ModelSettings(path=str(folder)))


def test_classifier_of_several_labels_is_no_scalar_model(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    tiny_scalar_of("llama", vocab_size=len(tokenizer), num_labels=3).save(tmp_path, tokenizer)
    settings = ModelSettings(path=str(tmp_path))
    with pytest.raises(ValueError, match=r"score\.weight"):
        load_scalar(settings)
    assert load_scalar(settings, new_head=True).head.weight.shape == (1, 32)


def test_tokenizer_missing(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        (OSError, ValueError),
        match=r"(?s)cannot load .*policy: .*tokenizer|policy.* vocabulary is missing",
    ):
        load_chat(ModelSettings(path=str(folder)))


# Heads -------------------------------------------------------------------------------------------


def test_no_head_no_scores(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no reward head \(score\.weight\)"):
        load_scalar(ModelSettings(path=str(folder)))
    with pytest.raises(ValueError, match="no reward head"):
        load_scalar(ModelSettings(path=str(folder)), new_head=False)


def test_new_head_has_variance_1_over_d_plus_1(tmp_path: Path) -> None:
    width = 1024
    tokenizer = tokenizer_of()
    architecture = {"n_embd": width, "n_layer": 1, "n_head": 2, "n_inner": 8, "n_positions": 16}
    torch.manual_seed(0)
    model = new_policy({"model_type": "gpt2", **architecture}, tokenizer)
    save_policy(model, tokenizer, tmp_path)
    heads = [
        load_scalar(ModelSettings(path=str(tmp_path)), new_head=True).head.weight.detach()
        for _ in range(4)
    ]
    weights = torch.stack(heads) * (width + 1) ** 0.5
    assert weights.numel() == 4 * width
    assert abs(weights.mean().item()) < 0.07
    assert abs(weights.var().item() - 1) < 0.1
    assert not torch.equal(heads[0], heads[1])


def test_new_head_comes_from_torchs_generator_and_replaces_an_old_one(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    old = tiny_scalar_of("llama", vocab_size=len(tokenizer))
    old.save(tmp_path, tokenizer)
    settings = ModelSettings(path=str(tmp_path))
    heads = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        heads.append(load_scalar(settings, new_head=True).head.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert not torch.equal(heads[0], old.head.weight)


def test_scalar_model_pads_as_the_tokenizer_does(folder: Path) -> None:
    model = load_scalar(ModelSettings(path=str(folder)), new_head=True)
    assert model.classifier.config.pad_token_id == load_chat(ModelSettings(path=str(folder))).pad_id


# Dropout and vocabulary --------------------------------------------------------------------------

DROPOUT = {
    "gpt2": ("attn_pdrop", "embd_pdrop", "resid_pdrop"),
    "llama": ("attention_dropout",),
    "opt": ("dropout", "attention_dropout", "layerdrop"),
    "gpt_neox": ("attention_dropout", "hidden_dropout"),
    "bloom": ("attention_dropout", "hidden_dropout"),
}


@pytest.mark.parametrize("architecture", DROPOUT)
def test_loaded_policy_has_no_dropout_in_training(architecture: str, tmp_path: Path) -> None:
    rates: dict[str, Any] = {name: 0.3 for name in DROPOUT[architecture]}
    tokenizer = tokenizer_of()
    model = tiny_policy_of(architecture, vocab_size=len(tokenizer), **rates)
    save_policy(model, tokenizer, tmp_path)
    ids = torch.arange(3, 23)[None]

    attention = model.config._attn_implementation
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=attention).train()
    assert not torch.equal(plain(input_ids=ids).logits, plain(input_ids=ids).logits)

    settings = ModelSettings(path=str(tmp_path), attention=attention)
    loaded = load_policy(settings)
    evaluated = loaded(input_ids=ids).logits
    loaded.train()
    for _ in range(3):
        torch.testing.assert_close(loaded(input_ids=ids).logits, evaluated, rtol=0, atol=1e-5)

    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in rates} == rates


def test_dropout_is_off_in_scalar_models(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    rates: dict[str, Any] = {name: 0.3 for name in DROPOUT["gpt2"]}
    save_policy(tiny_policy_of("gpt2", vocab_size=len(tokenizer), **rates), tokenizer, tmp_path)
    model = load_scalar(ModelSettings(path=str(tmp_path)), new_head=True).train()
    scores = [compute_scores(model, TREES, Packer(64)) for _ in range(2)]
    torch.testing.assert_close(*scores, rtol=0, atol=1e-5)


def test_new_policy_takes_vocabulary_and_special_tokens_from_the_tokenizer() -> None:
    tokenizer = tokenizer_of()
    architecture = {"model_type": "llama", **ARCHITECTURES["llama"]}
    before = dict(architecture)
    torch.manual_seed(0)
    model = new_policy(architecture, tokenizer)
    assert architecture == before
    assert model.get_input_embeddings().num_embeddings == len(tokenizer) == 260
    assert model.config.eos_token_id == 0
    assert model.config.pad_token_id == 1
    assert not model.training
    torch.manual_seed(0)
    again = new_policy(architecture, tokenizer)
    assert all(map(torch.equal, model.parameters(), again.parameters()))
