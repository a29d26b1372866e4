"""Samples and scores with one model of every kind of architecture, or refuses it by name.

tests/long/architectures.py runs all architectures through all stages.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf.generation.decoder import DECODING_MODES, decoding_mode_for
from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.layout import packer_for
from rlhf.models.limits import check_vocabulary
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.passes import compute_logprobs, compute_scores, compute_values
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.models.shared_bases import SharedBases, weight_bytes
from rlhf.models.tokenizers import load_chat
from tests.rlhf.every_architecture import save_tiny, tiny_config
from tests.rlhf.tiny_models import byte_tokenizer

SIDE_BY_SIDE, BY_LENGTH, WITHOUT_CACHE = DECODING_MODES
REPRESENTATIVES = {
    "mixtral": SIDE_BY_SIDE,
    "qwen3_5_text": SIDE_BY_SIDE,
    "falcon_h1": SIDE_BY_SIDE,
    "mamba": SIDE_BY_SIDE,
    "llama4_text": SIDE_BY_SIDE,
    "granite": SIDE_BY_SIDE,
    "rwkv": WITHOUT_CACHE,  # its state is not a cache of transformers'
    "recurrent_gemma": WITHOUT_CACHE,  # its layers hold its state, and of one batch only
}
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [18, 19], [20, 21]]

PathOf = Callable[[str], str]
"""Gives the folder of a tiny model of an architecture."""


def tokenizer() -> PreTrainedTokenizerBase:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    made = byte_tokenizer("<s>", "</s>", "<pad>", **names)
    Chat(made)
    return made


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> PathOf:
    root = tmp_path_factory.mktemp("architectures")

    def path_of(model_type: str) -> str:
        folder = root / model_type
        if not folder.exists():
            save_tiny(model_type, tokenizer(), folder)
        return str(folder)

    return path_of


def greedy_without_cache(policy: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            logits = policy(input_ids=torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.filterwarnings("ignore:.*(cannot take the packing mask|samples )")
@pytest.mark.parametrize("model_type", REPRESENTATIVES)
@pytest.mark.slow
def test_text_is_sampled_with_its_history(models: PathOf, model_type: str) -> None:
    """Greedy tokens are those of passes without a cache, also after rows are removed.

    The sampler's log-probabilities are those of the trainer.
    """
    policy = load_policy(ModelSettings(path=models(model_type)))
    assert decoding_mode_for(policy) == REPRESENTATIVES[model_type]
    expected = [greedy_without_cache(policy, prompt, 8) for prompt in PROMPTS]
    end_id = expected[0][1]  # so that one row is removed early
    decoding = Decoding(end_id=end_id, max_new_tokens=8, temperature=0)
    greedy = generate(policy, PROMPTS, GenerationSettings(), decoding).responses
    for found, tokens in zip(greedy, expected, strict=True):
        ends = tokens.index(end_id) + 1 if end_id in tokens else len(tokens)
        assert found == tokens[:ends]
    decoding = Decoding(end_id=end_id, max_new_tokens=8, temperature=1)
    draws = torch.Generator().manual_seed(0)
    samples = generate(policy, PROMPTS, GenerationSettings(), decoding, draws)
    trees = [
        PromptTree(tuple(prompt), (tuple(response),))
        for prompt, response in zip(PROMPTS, samples.responses, strict=True)
    ]
    trained = compute_logprobs(policy, trees, packer_for(policy, 64))
    for row, logprobs in zip(trained, samples.logprobs, strict=True):
        assert row[: len(logprobs)].tolist() == pytest.approx(logprobs, abs=1e-4)


def test_no_way_is_taken_that_forgets(monkeypatch: pytest.MonkeyPatch, models: PathOf) -> None:
    """A model that silently drops its cache is read anew for every token.

    One in which padding changes results gets prompts of one length at a time.
    """
    policy = load_policy(ModelSettings(path=models("granite")))
    forward = type(policy).forward

    def forgetful(self: PreTrainedModel, past_key_values: Any = None, **inputs: Any) -> Any:
        return forward(self, **inputs)

    monkeypatch.setattr(type(policy), "forward", forgetful)
    with pytest.warns(UserWarning, match="samples without a cache"):
        assert decoding_mode_for(policy) == WITHOUT_CACHE

    def sees_padding(
        self: PreTrainedModel, input_ids: Tensor, past_key_values: Any = None, **inputs: Any
    ) -> Any:
        inputs.pop("attention_mask", None)
        return forward(self, input_ids=input_ids, past_key_values=past_key_values, **inputs)

    other = load_policy(ModelSettings(path=models("granite")))
    monkeypatch.setattr(type(policy), "forward", sees_padding)
    with pytest.warns(UserWarning, match="one length at a time"):
        assert decoding_mode_for(other) == BY_LENGTH


@pytest.mark.filterwarnings("ignore:.*cannot take the packing mask")
@pytest.mark.parametrize(
    "model_type", ["granite", "llama4_text", "mamba", "falcon_h1", "modernbert-decoder"]
)
def test_scalar_model_without_a_classifier_of_transformers(
    models: PathOf, model_type: str, tmp_path: Path
) -> None:
    """It is made of the causal LM's body and a head, which are saved and loaded together."""
    settings = ModelSettings(path=models(model_type))
    model = load_scalar(settings, new_head=True)
    trees = [PromptTree((5, 6, 7), ((8, 9, 1), (10, 1)))]
    packer = packer_for(model.classifier, 64)
    scores = compute_scores(model, trees, packer)
    model.save(tmp_path / "saved", tokenizer())
    loaded = load_scalar(replace_path(settings, tmp_path / "saved"))
    assert torch.allclose(compute_scores(loaded, trees, packer), scores, atol=1e-5)
    policy = load_policy(settings)
    body = policy.get_submodule("backbone" if model_type == "mamba" else "model")
    hidden = body(input_ids=torch.tensor([[5, 6, 7, 8, 9, 1]]), use_cache=False)[0]
    by_hand = (hidden[0, -1] * model.head.weight[0]).sum()
    assert scores[0].item() == pytest.approx(by_hand.item(), abs=1e-4)
    with pytest.raises(ValueError, match="is a reward model"):
        load_policy(replace_path(settings, tmp_path / "saved"))
    with pytest.raises(ValueError, match="has no reward head"):
        load_scalar(settings)


def test_classifiers_of_transformers_are_taken_where_there_are_any(
    models: PathOf, tmp_path: Path
) -> None:
    settings = ModelSettings(path=models("mixtral"))
    load_scalar(settings, new_head=True).save(tmp_path, tokenizer())
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(plain).__module__.startswith("transformers.")


@pytest.mark.filterwarnings("ignore:.*cannot take the packing mask")
def test_own_classifier_shares_the_policys_base(models: PathOf, tmp_path: Path) -> None:
    """Policy and value model are adapters over one base, if transformers has no classifier."""
    lora, bases = LoraSettings(rank=2), SharedBases()
    settings = ModelSettings(path=models("granite"))
    policy = load_policy(settings, lora, bases)
    value_model = load_scalar(settings, new_head=True, lora=lora, bases=bases)
    together, alone = weight_bytes(policy, value_model), weight_bytes(value_model)
    assert together < weight_bytes(policy) + 0.5 * alone
    value_model.save(tmp_path, tokenizer())
    loaded = load_scalar(replace_path(settings, tmp_path))
    trees = [PromptTree((5, 6, 7), ((8, 9, 1),))]
    packer = Packer(64)
    assert torch.allclose(
        compute_values(loaded, trees, packer), compute_values(value_model, trees, packer), atol=1e-4
    )


def test_eager_attention_where_there_is_no_sdpa(models: PathOf) -> None:
    policy = load_policy(ModelSettings(path=models("gemma2")))
    assert policy.config._attn_implementation == "eager"
    assert packer_for(policy, 64).shares_prompts


def test_bidirectional_model_is_refused(tmp_path: Path) -> None:
    made = tokenizer()
    AutoModelForMaskedLM.from_config(tiny_config("bert", made)).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{tmp_path} .*is bidirectional"):
        load_policy(ModelSettings(path=str(tmp_path)))
    with pytest.raises(ValueError, match="is bidirectional"):
        load_scalar(ModelSettings(path=str(tmp_path)), new_head=True)


def test_logits_that_change_with_the_length_are_refused(models: PathOf) -> None:
    """ProphetNet's hidden states depend on earlier tokens only, but its logits do not."""
    with pytest.raises(ValueError, match="is bidirectional"):
        load_policy(ModelSettings(path=models("prophetnet")))


def test_model_that_fails_in_training_only_is_refused(models: PathOf) -> None:
    """Reformer's axial positions read any length in evaluation mode, but only one in training."""
    with pytest.raises(ValueError, match=r"16 tokens in training .*axial_pos_shape"):
        load_policy(ModelSettings(path=models("reformer")))


def test_text_part_that_could_not_be_loaded_again_is_refused(models: PathOf) -> None:
    """Policy and reward model are refused before anything is trained."""
    settings = ModelSettings(path=models("mllama"))
    refusal = "causal LM of mllama as model_type mllama_text_model, which it cannot load again"
    with pytest.raises(ValueError, match=refusal):
        load_policy(settings)
    with pytest.raises(ValueError, match=refusal):
        load_scalar(settings, new_head=True)


def test_text_part_of_a_model_of_images_is_trained_and_saved(
    models: PathOf, tmp_path: Path
) -> None:
    policy = load_policy(ModelSettings(path=models("llama4")))
    save_policy(policy, tokenizer(), tmp_path)
    loaded = load_policy(ModelSettings(path=str(tmp_path)))
    assert loaded.config.model_type == "llama4_text"
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids).logits, policy(ids).logits)


def test_encoder_that_was_made_a_decoder_is_causal(tmp_path: Path) -> None:
    made = tokenizer()
    config = tiny_config("bert", made)
    config.is_decoder = True
    AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    load_policy(ModelSettings(path=str(tmp_path)))


def test_token_without_an_embedding_is_named(models: PathOf, tmp_path: Path) -> None:
    shutil.copytree(models("granite"), tmp_path / "gap")
    path = tmp_path / "gap" / "tokenizer.json"
    inner = json.loads(path.read_text())
    vocabulary = inner["model"]["vocab"]
    vocabulary["b"] = 400
    path.write_text(json.dumps(inner))
    settings = ModelSettings(path=str(tmp_path / "gap"))
    with pytest.raises(ValueError, match="token 'b' has id 400"):
        check_vocabulary(load_policy(settings), load_chat(settings), settings.path)


def test_added_token_without_an_embedding_is_named(models: PathOf) -> None:
    chat = load_chat(ModelSettings(path=models("granite")))
    chat.tokenizer.add_tokens(["<call>"])
    policy = load_policy(ModelSettings(path=models("granite")))
    with pytest.raises(ValueError, match="<call>"):
        check_vocabulary(policy, chat, "here")


def replace_path(settings: ModelSettings, path: Path) -> ModelSettings:
    return ModelSettings(path=str(path), attention=settings.attention)
