"""Rewards: what a saved reward model gives back, what is refused, a user's own function."""

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf.chat import Chat
from rlhf.config import ModelSettings
from rlhf.inference import compute_scores
from rlhf.models import load_scalar, load_tokenizer, new_policy, packer_for, save_policy
from rlhf.packing import PromptTree
from rlhf.records import Prompt
from rlhf.rewards import (
    FunctionReward,
    GoldenRow,
    RewardCard,
    RewardModel,
    RewardSettings,
    adjust_missing_end,
    check_rendering,
    clip_scores,
    load_function,
    load_reward,
    load_reward_model,
    load_value_model,
    rendering_hash,
    same_rendering,
    trees_of,
)
from tests.rlhf.tiny_models import byte_tokenizer

PROMPTS = ["one", "one", "two", [{"role": "user", "content": "three"}]]
RESPONSES = ["yes", "no, rather long", "", "perhaps"]


def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer("<end>", "<pad>", eos_token="<end>", pad_token="<pad>")


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rewards") / "sft"
    architecture = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    words = tokenizer()
    save_policy(new_policy(architecture, words), words, folder)
    return folder


@pytest.fixture(scope="module")
def saved(sft: Path) -> Path:
    """A reward model with a new head, bias 0.5 and scale 2, as the rm stage would leave it."""
    torch.manual_seed(1)
    folder = sft.parent / "rm"
    model = load_scalar(ModelSettings(path=str(sft)), new_head=True)
    model.bias, model.scale = 0.5, 2.0
    chat = Chat(load_tokenizer(str(sft)))
    trees = [
        PromptTree(tuple(chat.prompt_ids(prompt)), (tuple(chat.response_ids(response)),))
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    scores = compute_scores(model, trees, packer_for(model.classifier, 512)).tolist()
    rows = zip(PROMPTS, RESPONSES, scores, strict=True)
    model.save(folder, chat.tokenizer)
    RewardCard(
        bias=0.5,
        scale=2.0,
        pair_accuracy=0.8,
        interval=(0.7, 0.9),
        golden=tuple(GoldenRow(prompt=p, response=r, score=s) for p, r, s in rows),
        template_hash=chat.template_hash,
        rendering_hash=rendering_hash(chat),
    ).save(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def load(folder: Path, **options: Any) -> RewardModel:
    return load_reward_model(
        ModelSettings(path=str(folder)), micro_batch_tokens=options.pop("tokens", 512), **options
    )


def ids_of(chat: Chat) -> tuple[list[list[int]], list[list[int]]]:
    prompts = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    return prompts, [chat.response_ids(response) for response in RESPONSES]


@pytest.mark.parametrize("side", ["right", "left"])
def test_scores_are_those_of_the_plain_classifier_on_a_padded_batch(saved: Path, side: str) -> None:
    reward = load(saved)
    prompts, responses = ids_of(reward.chat)
    plain = AutoModelForSequenceClassification.from_pretrained(saved).eval()
    words = load_tokenizer(str(saved))
    words.padding_side = side
    rows = [{"input_ids": p + r} for p, r in zip(prompts, responses, strict=True)]
    batch = words.pad(rows, return_tensors="pt")
    if side == "left":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        raw = plain(**batch).logits.squeeze(1)
    found = reward.scores(prompts, responses)
    assert found.std() > 0.1
    torch.testing.assert_close(found, 2.0 * (raw - 0.5), atol=1e-5, rtol=1e-5)


def test_a_score_depends_neither_on_its_neighbours_nor_on_the_token_budget(saved: Path) -> None:
    reward = load(saved)
    prompts, responses = ids_of(reward.chat)
    together = reward.scores(prompts, responses)
    alone = torch.cat([reward.scores([p], [r]) for p, r in zip(prompts, responses, strict=True)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    small = load(saved, tokens=16).scores(prompts[::-1], responses[::-1]).flip(0)
    torch.testing.assert_close(together, small, atol=1e-5, rtol=1e-5)


def test_neighbours_with_one_prompt_become_one_tree() -> None:
    trees = trees_of([[1], [1], [2], [1]], [[5], [6, 7], [8], [9]])
    assert trees == [
        PromptTree((1,), ((5,), (6, 7))),
        PromptTree((2,), ((8,),)),
        PromptTree((1,), ((9,),)),
    ]


def test_golden_rows_tell_that_weights_were_altered(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights["score.weight"] = weights["score.weight"] + 0.05
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"golden row 0 at .* weights, tokenizer or chat template"):
        load(copy)


def test_a_folder_without_a_card_is_refused(copy: Path) -> None:
    (copy / "reward.json").unlink()
    with pytest.raises(ValueError, match=r"has no reward\.json"):
        load(copy)


def test_a_card_that_is_none_is_refused(copy: Path) -> None:
    (copy / "reward.json").write_text('{"bias": 0.0}')
    with pytest.raises(ValueError, match="no reward card of the rm stage"):
        load(copy)


def test_a_folder_without_a_head_is_refused(sft: Path, saved: Path, tmp_path: Path) -> None:
    headless = Path(shutil.copytree(sft, tmp_path / "headless"))
    shutil.copy(saved / "reward.json", headless)
    with pytest.raises(ValueError, match=r"no reward head \(score\.weight\)"):
        load(headless)


def test_a_reward_model_that_may_be_chance_needs_leave(copy: Path) -> None:
    card = json.loads((copy / "reward.json").read_text())
    card["interval"] = [0.5, 0.6]
    (copy / "reward.json").write_text(json.dumps(card))
    with pytest.raises(ValueError, match=r"no better than a coin.*allow_chance_reward"):
        load(copy)
    assert load(copy, allow_chance_reward=True).card.interval == (0.5, 0.6)


def test_another_template_or_vocabulary_than_the_policys_is_refused(saved: Path) -> None:
    reward_chat = Chat(load_tokenizer(str(saved)))
    other = tokenizer()
    other.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"another chat template .*[0-9a-f]{12}.*[0-9a-f]{12}"):
        load(saved, policy_chat=Chat(other))
    swapped = byte_tokenizer("<pad>", "<end>", eos_token="<end>", pad_token="<pad>")
    with pytest.raises(ValueError, match="another tokenizer"):
        check_rendering(Chat(swapped), reward_chat, "rm")
    assert same_rendering(Chat(tokenizer()), reward_chat)


def test_the_value_model_starts_with_the_rewards_bias_and_scale(saved: Path) -> None:
    value_model = load_value_model(ModelSettings(path=str(saved)))
    assert (value_model.bias, value_model.scale) == (0.5, 2.0)
    assert all(parameter.requires_grad for parameter in value_model.parameters())


def function_reward(function: Callable[..., Any]) -> torch.Tensor:
    prompts = [Prompt("a", {"weight": 2.0}), Prompt("b", {"weight": 3.0})]
    return FunctionReward(function, "own:reward").score(prompts, [[1], [1]], [[2], [2]], ["x", ""])


def test_a_function_sees_prompts_responses_and_meta() -> None:
    def reward(prompts: list[Any], responses: list[str], metas: list[dict[str, Any]]) -> list[Any]:
        assert prompts == ["a", "b"]
        return [len(r) + meta["weight"] for r, meta in zip(responses, metas, strict=True)]

    assert function_reward(reward).tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    "function, message",
    [
        (lambda p, r, m: [1.0], "own:reward returned 1 scores for 2 responses.* is 1"),
        (lambda p, r, m: [1.0] * 3, "returned 3 scores for 2"),
        (lambda p, r, m: 1.0, "returned float"),
        (lambda p, r, m: [1.0, float("nan")], "gave nan for row 1"),
        (lambda p, r, m: [float("inf"), 1.0], "gave inf for row 0"),
        (lambda p, r, m: [1.0, "good"], "gave 'good' for row 1"),
        (lambda p, r, m: [1 / len(x) for x in r], "failed on row 1 .*ZeroDivisionError"),
    ],
)
def test_what_a_function_gets_wrong_is_told_with_its_row(
    function: Callable[..., Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function_reward(function)


def test_functions_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_rewards.py").write_text("def short(p, r, m): return [-len(x) for x in r]\n")
    monkeypatch.syspath_prepend(tmp_path)
    reward = load_reward(
        RewardSettings(function="own_rewards:short"), Chat(tokenizer()), "cpu", 512
    )
    assert reward.score([Prompt("a")], [[1]], [[2]], ["four"]).tolist() == [-4.0]
    with pytest.raises(ValueError, match="has no function 'shrt'; it has short"):
        load_function("own_rewards:shrt")
    sys.modules.pop("own_rewards")


@pytest.mark.parametrize("name", ["own_rewards.short", ":short", "no_such_module:short"])
def test_misspelt_function_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"package\.module:name|cannot import no_such_module"):
        load_function(name)


def test_missing_ends_and_clip() -> None:
    scores = torch.tensor([3.0, 3.0, -5.0])
    finished = torch.tensor([True, False, False])
    assert adjust_missing_end(scores, finished, "replace", -1.0).tolist() == [3.0, -1.0, -1.0]
    assert adjust_missing_end(scores, finished, "subtract", 1.0).tolist() == [3.0, 2.0, -6.0]
    assert adjust_missing_end(scores, finished, "none", 9.0).tolist() == [3.0, 3.0, -5.0]
    assert clip_scores(scores, 4.0).tolist() == [3.0, 3.0, -4.0]
    assert clip_scores(scores, None).tolist() == [3.0, 3.0, -5.0]
    assert scores.tolist() == [3.0, 3.0, -5.0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "exactly one"),
        ({"model": "rm", "function": "a:b"}, "exactly one"),
        ({"model": "rm", "missing_end_value": -1.0}, "reward responses without an end"),
        ({"model": "rm", "missing_end_value": float("nan")}, "missing_end_value is nan"),
        ({"model": "rm", "clip": 0.0}, "clip is 0.0"),
    ],
)
def test_contradictory_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardSettings(**changes)


def test_the_card_comes_back_as_it_was(saved: Path, tmp_path: Path) -> None:
    card = dataclasses.replace(RewardCard.load(saved), bias=-1.25)
    card.save(tmp_path)
    assert RewardCard.load(tmp_path) == card
