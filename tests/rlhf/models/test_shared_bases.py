"""Tests models over one copy of frozen weights: what they compute, and their memory."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from rlhf.inputs.packing import Layout, Packer, PromptTree
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.passes import compute_logprobs, compute_scores, compute_values
from rlhf.models.saving import save_policy
from rlhf.models.scalar import ScalarModel
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.models.shared_bases import SharedBases, weight_bytes
from tests.rlhf.tiny_models import byte_tokenizer, change_trained, tiny_policy_of, tiny_scalar_of

LORA = LoraSettings(rank=4)
TREES = [PromptTree((3, 4, 5), ((6, 7, 8), (9, 10))), PromptTree((11, 12), ((13, 14, 15),))]
PACKER = Packer(64)


@pytest.fixture(params=["llama", "gpt2"])
def work(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Save a base, and adapters of a policy and of a reward model over it."""
    tokenizer = byte_tokenizer("<eos>", "<pad>", eos_token="<eos>", pad_token="<pad>")
    base = tiny_policy_of(request.param, vocab_size=len(tokenizer))
    save_policy(base, tokenizer, tmp_path / "base")
    policy = load_policy(ModelSettings(path=str(tmp_path / "base")), LORA)
    change_trained(policy, 1)
    save_policy(policy, tokenizer, tmp_path / "sft")
    reward = load_scalar(ModelSettings(path=str(tmp_path / "sft")), new_head=True, lora=LORA)
    change_trained(reward, 2)
    reward.save(tmp_path / "rm", tokenizer)
    full = tiny_scalar_of(request.param, vocab_size=len(tokenizer))
    full.save(tmp_path / "full_rm", tokenizer)
    return tmp_path


Roles = tuple[PreTrainedModel, ScalarModel, PreTrainedModel, ScalarModel]


def load_roles(work: Path, bases: SharedBases | None, sft: str = "sft", rm: str = "rm") -> Roles:
    """Load policy, value model, reference and reward model."""
    policy, reward = (ModelSettings(path=str(work / name)) for name in (sft, rm))
    return (
        load_policy(policy, LORA, bases),
        load_scalar(reward, lora=LORA, bases=bases),
        load_policy(policy, bases=bases),
        load_scalar(reward, bases=bases),
    )


def outputs(roles: Roles) -> list[torch.Tensor]:
    policy, value, reference, reward = roles
    return [
        compute_logprobs(policy, TREES, PACKER),
        compute_values(value, TREES, PACKER),
        compute_logprobs(reference, TREES, PACKER),
        compute_scores(reward, TREES, PACKER),
    ]


@pytest.mark.parametrize(("sft", "rm"), [("sft", "rm"), ("base", "rm"), ("sft", "full_rm")])
@pytest.mark.slow
def test_roles_on_one_base_compute_what_four_models_do(work: Path, sft: str, rm: str) -> None:
    separate, shared = (load_roles(work, bases, sft, rm) for bases in (None, SharedBases()))
    for one, other in zip(outputs(separate), outputs(shared), strict=True):
        assert one.std() > 0.01
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    # and training one changes no other
    before = outputs(shared)
    change_trained(shared[0], 3)
    change_trained(shared[1], 4)
    moved = [(a - b).abs().max() for a, b in zip(outputs(shared), before, strict=True)]
    assert min(moved[:2]) > 0.01 and max(moved[2:]) == 0


def test_roles_weigh_one_base_and_their_adapters(work: Path) -> None:
    base = weight_bytes(load_policy(ModelSettings(path=str(work / "base"))))
    bases = SharedBases()
    roles = load_roles(work, bases)
    own = sum(
        parameter.numel() * 4
        for role in roles
        for name, parameter in role.named_parameters()
        if "lora_" in name or name.endswith("score.weight")
    )
    assert weight_bytes(*roles) == base + own
    assert weight_bytes(*load_roles(work, None)) > 3 * base
    assert packer_for(roles[1].classifier, 64).layout == Layout.SEGMENTS, (
        "it has not the base's attention"
    )


def test_only_trained_adapters_and_the_value_head_want_gradients(work: Path) -> None:
    policy, value, reference, reward = load_roles(work, SharedBases())
    for model in (policy, value):
        trained = [name for name, p in model.named_parameters() if p.requires_grad]
        expected = [
            name
            for name, _ in model.named_parameters()
            if "lora_" in name or name.endswith("score.weight")
        ]
        assert trained == expected != []
    for model in (reference, reward):
        assert not any(p.requires_grad for p in model.parameters())


def test_full_reward_model_and_the_value_model_on_it_share_its_weights(work: Path) -> None:
    bases = SharedBases()
    _, value, _, reward = load_roles(work, bases, rm="full_rm")
    adapters = sum(p.numel() * 4 for p in value.parameters() if p.requires_grad)
    assert weight_bytes(value, reward) == weight_bytes(reward) + adapters
    assert value.head.weight is not reward.head.weight
    assert torch.equal(value.head.weight, reward.head.weight)


def test_other_types_and_attentions_are_not_shared(work: Path) -> None:
    bases = SharedBases()
    path = str(work / "base")
    one = load_policy(ModelSettings(path=path), bases=bases)
    for settings in (
        ModelSettings(path=path, dtype="bfloat16"),
        ModelSettings(path=path, attention="eager"),
    ):
        other = load_policy(settings, bases=bases)
        assert weight_bytes(one, other) == weight_bytes(one) + weight_bytes(other)
        assert packer_for(other, 64).shares_prompts


def test_a_missing_head_is_refused_on_shared_weights_too(work: Path) -> None:
    bases = SharedBases()
    settings = ModelSettings(path=str(work / "base"))
    load_policy(settings, bases=bases)
    load_scalar(settings, new_head=True, bases=bases)
    with pytest.raises(ValueError, match="no reward head"):
        load_scalar(settings, bases=bases)
    with pytest.raises(ValueError, match="no reward head"):
        load_scalar(settings, bases=bases)
