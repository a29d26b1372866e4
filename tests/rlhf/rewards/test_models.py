"""Tests reward models: what a saved one scores, what is refused, and how one reads text."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rlhf.generation.answers import Answer
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import PromptTree
from rlhf.inputs.records import Prompt
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.load import load_reward, load_reward_model_for_policy, reward_models_of
from rlhf.rewards.models import (
    REWARD_FILE,
    RewardCard,
    RewardModel,
    TextRewardModel,
    load_reward_model,
    load_value_model,
    measured_dtype,
    trees_of,
)
from rlhf.rewards.rendering import check_rendering, same_rendering, same_vocabulary
from rlhf.rewards.settings import PartSettings, RewardSettings
from tests.rlhf.answers import fitted, of_ids
from tests.rlhf.rewards.folders import (
    PROMPTS,
    RESPONSES,
    base_tokenizer,
    merging_tokenizer,
    save_base,
    save_reward_model,
)
from tests.rlhf.tiny_models import byte_tokenizer


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


class Params4bit(torch.nn.Parameter):
    """Has the name of bitsandbytes' weights, whose kernels are not needed here."""


def test_golden_rows_allow_what_four_bits_change(copy: Path) -> None:
    """A classifier over the body of a quantised policy has no mark that it is quantised."""
    reward = load(copy)
    with torch.no_grad():
        reward.model.head.weight *= 1.02
    with pytest.raises(ValueError, match="golden row"):
        reward.check_golden_rows()
    body = reward.model.classifier.model.layers[0].mlp.up_proj
    body.weight = Params4bit(body.weight.data)
    reward.check_golden_rows()
    with torch.no_grad():
        reward.model.head.weight *= -1
    with pytest.raises(ValueError, match="4bit, tolerance"):
        reward.check_golden_rows()


def test_a_folder_without_a_card_is_refused(copy: Path) -> None:
    (copy / "reward.json").unlink()
    with pytest.raises(ValueError, match=r"has no reward\.json"):
        load(copy)


def test_a_card_that_is_none_is_refused(copy: Path) -> None:
    (copy / "reward.json").write_text('{"bias": 0.0}')
    with pytest.raises(ValueError, match="is not a reward card of the rm stage"):
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
    parts = {"x": PartSettings(model=str(copy))}
    chat = Chat(base_tokenizer())
    with pytest.raises(ValueError, match="no better than a coin"):
        load_reward(RewardSettings(parts=parts), chat, "cpu", 512)
    load_reward(RewardSettings(parts=parts, allow_chance_reward=True), chat, "cpu", 512)


def test_another_template_or_vocabulary_than_the_policys_is_refused(saved: Path) -> None:
    reward_chat = Chat(load_tokenizer(str(saved)))
    other = base_tokenizer()
    other.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    with pytest.raises(ValueError, match=r"another chat template .*[0-9a-f]{12}.*[0-9a-f]{12}"):
        load(saved, policy_chat=Chat(other))
    swapped = byte_tokenizer("<pad>", "<end>", eos_token="<end>", pad_token="<pad>")
    with pytest.raises(ValueError, match="another tokenizer"):
        check_rendering(Chat(swapped), reward_chat, "rm")
    assert same_rendering(Chat(base_tokenizer()), reward_chat)


def test_the_value_model_starts_with_the_rewards_bias_and_scale(saved: Path) -> None:
    value_model = load_value_model(ModelSettings(path=str(saved)))
    assert (value_model.bias, value_model.scale) == (0.5, 2.0)
    assert all(parameter.requires_grad for parameter in value_model.parameters())


def test_the_card_comes_back_as_it_was(saved: Path, tmp_path: Path) -> None:
    card = dataclasses.replace(RewardCard.load(saved), bias=-1.25)
    card.save(tmp_path)
    assert RewardCard.load(tmp_path) == card


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a GPT-2 reward model of 96 positions whose tokenizer merges bytes."""
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(3)
    base = save_base(folder / "base", "gpt2", merging_tokenizer())
    return save_reward_model(folder / "rm", base, seed=4, bias=0.3, scale=1.5)


def judge_of(folder: Path, policy_chat: Chat) -> tuple[TextRewardModel, list[str]]:
    told: list[str] = []
    settings = ModelSettings(path=str(folder))
    reward = load_reward_model_for_policy(
        settings, policy_chat, micro_batch_tokens=512, log=told.append
    )
    assert isinstance(reward, TextRewardModel)
    return reward, told


def plain_score(folder: Path, ids: list[int]) -> float:
    """Return the score that transformers gives a row of ids, read at the last one."""
    plain = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        hidden = plain.base_model(torch.tensor([ids])).last_hidden_state[0, -1]
        return 1.5 * (float(plain.score(hidden)) - 0.3)


def test_a_reward_model_with_another_tokenizer_reads_text(foreign: Path) -> None:
    policy_chat = Chat(base_tokenizer())
    reward, told = judge_of(foreign, policy_chat)
    assert len(told) == 1 and told[0].startswith(f"the reward model reads text: {foreign}")
    own = reward.reward_model.chat
    texts = ["yes", "no, rather long", "", "perhaps"]
    whole = [policy_chat.response_ids(text) for text in texts]
    cut = [ids[:-1] for ids in whole[:2]]
    prompts = [fitted(policy_chat, prompt) for prompt in [*PROMPTS, *PROMPTS[:2]]]
    pairs = zip(prompts, [*whole, *cut], strict=True)
    found = reward.score([Answer.of(*pair, policy_chat) for pair in pairs]).scores
    end = own.tokenizer.eos_token
    encode = own.tokenizer.encode
    expected = [
        plain_score(foreign, encode(f"User:\n{prompt}\n\nAssistant:\n") + encode(response))
        for prompt, response in [
            ("one", f"yes{end}"),
            ("one", f"no, rather long{end}"),
            ("two", end),
            ("three", f"perhaps{end}"),
            ("one", "yes"),
            ("one", "no, rather long"),
        ]
    ]
    assert len(own.response_ids("no, rather long")) < len(whole[1])
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_a_cut_response_without_text_is_read_as_an_empty_one(foreign: Path) -> None:
    reward, _ = judge_of(foreign, Chat(base_tokenizer()))
    record = Prompt("one")
    pad = reward.score([of_ids([5], [1], record=record, text="")]).scores
    empty = reward.score([of_ids([5], [0], record=record, text="", is_finished=True)]).scores
    torch.testing.assert_close(pad, empty, rtol=0, atol=1e-5)


def test_what_its_context_cannot_hold_loses_its_oldest_turns(foreign: Path) -> None:
    reward, _ = judge_of(foreign, Chat(base_tokenizer()))

    def score(turns: list[str], response: str) -> float:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
        answer = of_ids([5], [6, 0], record=Prompt(messages), text=response, is_finished=True)
        return reward.score([answer]).scores.item()

    alone = pytest.approx(score(["one"], "yes"), abs=1e-5)
    assert score(["x " * 30, "y " * 30, "one"], "yes") == alone
    assert score(["x", "y", "one"], "yes") != alone
    chat = reward.reward_model.chat
    turns = [("user", "q"), ("assistant", "y"), ("user", "one")]
    taken = chat.prompt_ids([{"role": role, "content": text} for role, text in turns])
    room = 96 - len(taken) - len(chat.response_ids("yes"))  # every q is one token
    assert score(["q" + "q" * room, "y", "one"], "yes") != alone
    assert score(["q" + "q" * (room + 1), "y", "one"], "yes") == alone
    with pytest.raises(ValueError, match=r"row 0 is too long .*reads 96 tokens.*takes \d of"):
        score(["xq" * 60], "yes")


def test_a_reward_model_of_the_policys_rendering_reads_its_ids(saved: Path) -> None:
    told: list[str] = []
    settings = ModelSettings(path=str(saved))
    policy_chat = Chat(base_tokenizer())
    reward = load_reward_model_for_policy(
        settings, policy_chat, micro_batch_tokens=512, log=told.append
    )
    assert isinstance(reward, RewardModel)
    assert told == []
    prompt_ids, response_ids = ids_of(policy_chat)
    found = reward.score([of_ids(*pair) for pair in zip(prompt_ids, response_ids, strict=True)])
    expected = reward.scores(prompt_ids, response_ids)
    torch.testing.assert_close(found.scores, expected, rtol=0, atol=1e-5)
    assert found.token_rewards is None and found.parts == {}
    other = base_tokenizer()
    other.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    judge_of(saved, Chat(other))


def test_vocabularies_are_the_same_when_ids_mean_the_same() -> None:
    template = base_tokenizer()
    template.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    swapped = byte_tokenizer("<pad>", "<end>", eos_token="<end>", pad_token="<pad>")
    assert same_vocabulary(Chat(base_tokenizer()), Chat(template))
    assert not same_vocabulary(Chat(base_tokenizer()), Chat(swapped))


@pytest.fixture
def halved(sft: Path, tmp_path: Path) -> Path:
    """Save a reward model that was measured in bfloat16."""
    folder = tmp_path / "halved"
    return save_reward_model(folder, sft, seed=3, bias=0.0, scale=1.0, dtype="bfloat16")


def test_a_reward_model_is_read_in_the_type_it_was_measured_in(halved: Path, sft: Path) -> None:
    assert measured_dtype(halved) == "bfloat16"
    chat = Chat(load_tokenizer(str(sft)))
    reward = load_reward(RewardSettings(model=str(halved)), chat, "cpu", 512)
    (model,) = reward_models_of(reward)
    assert model.classifier.dtype == torch.bfloat16


def test_scores_of_another_type_name_it(halved: Path) -> None:
    load(halved)  # the tolerance is that of the coarser type
    change_card(halved, golden_shift=100.0)
    with pytest.raises(ValueError, match=r"was measured in bfloat16: reward\.dtype measured"):
        load(halved)


def test_an_older_card_names_the_type_as_a_possible_cause(halved: Path) -> None:
    change_card(halved, golden_shift=100.0, drop="dtype")
    assert measured_dtype(halved) == "float32"
    with pytest.raises(ValueError, match=r"does not say in which type .* reward\.dtype"):
        load(halved)


def change_card(folder: Path, golden_shift: float, drop: str | None = None) -> None:
    path = folder / REWARD_FILE
    values = json.loads(path.read_text())
    values["golden"][0]["score"] += golden_shift
    values.pop(drop, None)
    path.write_text(json.dumps(values))
