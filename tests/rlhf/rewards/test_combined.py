"""Tests rewards made of rewards, with numbers by hand and through their settings."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf.generation.answers import Answer
from rlhf.inputs.chat import Chat
from rlhf.inputs.records import Prompt
from rlhf.models.settings import ModelSettings
from rlhf.rewards.combined import EnsembleReward, NormalizedReward, RewardPart, WeightedReward
from rlhf.rewards.load import load_reward, reward_models_of
from rlhf.rewards.models import load_reward_model
from rlhf.rewards.scores import Scored, ScoreScale
from rlhf.rewards.settings import Combination, EnsembleSettings, PartSettings, RewardSettings
from tests.rlhf.answers import finished, of_ids, of_text
from tests.rlhf.rewards.folders import PROMPTS, RESPONSES, base_tokenizer


class Fixed:
    """Returns the same scores for every batch."""

    def __init__(self, *scores: float, tokens: list[list[float]] | None = None) -> None:
        self.scored = Scored(torch.tensor(scores), None if tokens is None else torch.tensor(tokens))

    def score(self, *_: object) -> Scored:
        return self.scored


def brevity(prompts: list[str], responses: list[str], metas: list[object]) -> list[float]:
    return [-float(len(response)) for response in responses]


def vowels(
    prompts: list[str], responses: list[str], metas: list[object], tokens: list[list[str]]
) -> list[list[float]]:
    return [[float(piece in "aeiou") for piece in pieces] for pieces in tokens]


BATCH = [of_text(Prompt("a"), "x")] * 2


def answers_of(chat: Chat) -> list[Answer]:
    pairs = zip(PROMPTS, RESPONSES, strict=True)
    return [finished(chat, prompt, response) for prompt, response in pairs]


def close(found: Tensor | None, expected: list[float] | list[list[float]]) -> bool:
    return found is not None and torch.allclose(found, torch.tensor(expected), atol=1e-6)


def test_parts_are_summed_by_their_weights_and_kept_without_them() -> None:
    tokens = [[1.0, 0.0], [0.0, 3.0]]
    reward = WeightedReward(
        {
            "good": RewardPart(Fixed(1.0, 2.0), 2.0),
            "bad": RewardPart(Fixed(4.0, 0.5), -1.0),
            "steps": RewardPart(Fixed(1.0, 3.0, tokens=tokens), 0.5),
            "flipped": RewardPart(Fixed(1.0, 3.0, tokens=tokens), -1.0),
        }
    )
    scored = reward.score([of_ids([1], [7]), of_ids([1], [7, 7])])
    assert close(scored.scores, [2 - 4 + 0.5 - 1, 4 - 0.5 + 1.5 - 3])
    assert close(scored.token_rewards, [[-0.5, 0.0], [0.0, -1.5]])
    assert close(scored.at_end, [-2.0, 3.5])
    parts = {name: part.tolist() for name, part in scored.parts.items()}
    assert parts == {"good": [1, 2], "bad": [4, 0.5], "steps": [1, 3], "flipped": [1, 3]}


RULED = Prompt("Use no commas.", meta={"instructions": ["no_comma"]})
FREE = Prompt("Hello", meta={"instructions": []})


def test_a_part_judges_the_prompts_that_it_is_for() -> None:
    """The rule gives 2 and 3 on prompts with rules; the model gives 10, 20, 30 on the others.

    The rule's scaled scores are (2 - 1) / 2 and (3 - 1) / 2, and its weight is 4.
    """
    scale = ScoreScale(mean=1.0, std=2.0)
    rules = RewardPart(Fixed(2.0, 3.0), 4.0, only_with="instructions", scale=scale)
    model = RewardPart(Fixed(10.0, 20.0, 30.0), only_without="instructions")
    records = [FREE, RULED, Prompt("Bye"), RULED, FREE]
    scored = WeightedReward({"rules": rules, "model": model}).score(
        [of_text(record, "Yes") for record in records]
    )
    assert scored.scores.tolist() == [10, 2, 20, 4, 30]
    assert scored.token_rewards is None
    assert scored.parts["rules"].nan_to_num(-1).tolist() == [-1, 2, -1, 3, -1]
    assert scored.parts["model"].nan_to_num(-1).tolist() == [10, -1, 20, -1, 30]


def test_a_part_that_judges_nothing_of_a_batch_adds_nothing() -> None:
    class Unasked:
        def score(self, answers: Sequence[Answer]) -> Scored:
            raise AssertionError("no answer is for this part")

    parts = {
        "rules": RewardPart(Unasked(), only_with="instructions"),
        "model": RewardPart(Fixed(1.0, 2.0)),
    }
    scored = WeightedReward(parts).score([of_text(FREE, "Yes")] * 2)
    assert scored.scores.tolist() == [1, 2]
    assert scored.parts["rules"].isnan().all()


def test_token_rewards_of_a_part_stand_at_the_answers_that_it_judges() -> None:
    """The part does not judge the longest answer, so its own rewards have fewer columns."""
    scale = ScoreScale(mean=1.0, std=2.0, per_token=3.0, mean_tokens=1.0)
    steps = RewardPart(Fixed(7.0, tokens=[[4.0, 3.0]]), 10.0, only_with="instructions", scale=scale)
    answers = [of_ids([1], [7, 7, 7], record=FREE), of_ids([1], [7, 7], record=RULED)]
    scored = WeightedReward({"steps": steps}).score(answers)
    assert close(scored.token_rewards, [[0.0, 0.0, 0.0], [20.0, 15.0, 0.0]])
    assert close(scored.scores, [0.0, 10 * (7 - 1 - 3 * (2 - 1)) / 2])
    assert close(scored.at_end, [0.0, 15.0 - 35.0])


def test_an_ensemble_tells_its_members_and_their_spread() -> None:
    reward = EnsembleReward([Fixed(1.0, 5.0), Fixed(3.0, 5.0)], "mean_minus_spread", 2.0)
    scored = reward.score(BATCH)
    assert close(scored.scores, [2.0 - 2.0 * 1.0, 5.0])
    parts = {name: part.tolist() for name, part in scored.parts.items()}
    assert parts == {"member_0": [1.0, 5.0], "member_1": [3.0, 5.0], "spread": [1.0, 0.0]}


def test_normalising_scales_tokens_and_shifts_the_end() -> None:
    scale = ScoreScale(mean=6.0, std=2.0)
    reward = NormalizedReward(Fixed(4.0, 8.0, tokens=[[1.0, 3.0], [8.0, 0.0]]), scale)
    scored = reward.score(BATCH)
    assert close(scored.scores, [-1.0, 1.0])
    assert close(scored.token_rewards, [[0.5, 1.5], [4.0, 0.0]])
    assert close(scored.at_end, [-3.0, -3.0])
    assert NormalizedReward(Fixed(4.0, 8.0), scale).score(BATCH).token_rewards is None


def test_normalising_may_take_out_the_length() -> None:
    """Each token is worth 2, and scores are halved.

    4 at 3 tokens is 4 - 5 - 2 * (3 - 2) = -3, and 8 at 1 token is 8 - 5 - 2 * (1 - 2) = 5.
    """
    scale = ScoreScale(mean=5.0, std=2.0, per_token=2.0, mean_tokens=2.0)
    answers = [of_ids([1], [7, 7, 7]), of_ids([1], [7])]
    reward = NormalizedReward(Fixed(4.0, 8.0, tokens=[[0.0, 1.0, 3.0], [8.0, 0.0, 0.0]]), scale)
    scored = reward.score(answers)
    assert close(scored.scores, [-1.5, 2.5])
    assert close(scored.token_rewards, [[0.0, 0.5, 1.5], [4.0, 0.0, 0.0]])


def test_parts_come_from_their_settings(saved: Path) -> None:
    here = "tests.rlhf.rewards.test_combined"
    settings = RewardSettings(
        parts={
            "helpful": PartSettings(model=str(saved), weight=0.5),
            "brief": PartSettings(function=f"{here}:brevity", weight=0.125, only_without="long"),
            "unused": PartSettings(function=f"{here}:brevity", only_with="long"),
            "vowels": PartSettings(function=f"{here}:vowels", per_token=True, weight=-2.0),
        }
    )
    chat = Chat(base_tokenizer())
    reward = load_reward(settings, chat, "cpu", 512)
    prompt_ids = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    response_ids = [chat.response_ids(response) for response in RESPONSES]
    scored = reward.score(answers_of(chat))
    alone = load_reward_model(ModelSettings(path=str(saved)), micro_batch_tokens=512)
    helpful = alone.scores(prompt_ids, response_ids)
    lengths, counts = torch.tensor([3, 15, 0, 7]), torch.tensor([1, 4, 0, 2])
    assert torch.allclose(scored.scores, 0.5 * helpful - 0.125 * lengths - 2 * counts, atol=1e-5)
    assert scored.token_rewards is not None
    assert scored.token_rewards[3].tolist() == [0, -2, 0, 0, -2, 0, 0, *[0] * 9]
    assert list(scored.parts) == ["helpful", "brief", "unused", "vowels"]
    assert scored.parts["unused"].isnan().all()


def test_reward_models_are_held_as_the_settings_say(saved: Path) -> None:
    settings = RewardSettings(model=str(saved), attention="eager")
    (model,) = reward_models_of(load_reward(settings, Chat(base_tokenizer()), "cpu", 512))
    assert model.classifier.config._attn_implementation == "eager"


@pytest.mark.parametrize("combine", ["mean", "worst"])
def test_an_ensemble_comes_from_its_settings(
    saved: Path, other: Path, combine: Combination
) -> None:
    folders = (str(saved), str(other))
    settings = RewardSettings(ensemble=EnsembleSettings(models=folders, combine=combine))
    chat = Chat(base_tokenizer())
    prompt_ids = [chat.prompt_ids(prompt) for prompt in PROMPTS]
    response_ids = [chat.response_ids(response) for response in RESPONSES]
    found = load_reward(settings, chat, "cpu", 512).score(answers_of(chat)).scores.tolist()
    members = [
        load_reward_model(ModelSettings(path=path), micro_batch_tokens=512)
        .scores(prompt_ids, response_ids)
        .tolist()
        for path in folders
    ]
    assert members[0] != pytest.approx(members[1], abs=0.1)
    pairs = list(zip(*members, strict=True))
    expected = [min(pair) if combine == "worst" else sum(pair) / 2 for pair in pairs]
    assert found == pytest.approx(expected, abs=1e-5)


def test_golden_rows_of_every_member_are_checked(saved: Path, other: Path, tmp_path: Path) -> None:
    altered = Path(shutil.copytree(other, tmp_path / "altered"))
    card = (altered / "reward.json").read_text()
    (altered / "reward.json").write_text(card.replace('"bias": -0.25', '"bias": 0.5'))
    settings = RewardSettings(ensemble=EnsembleSettings(models=(str(saved), str(altered))))
    with pytest.raises(ValueError, match="golden row 0"):
        load_reward(settings, Chat(base_tokenizer()), "cpu", 512)
