"""Tests rewards in PPO: their tokens, what is logged, their scale, and the value model."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from rlhf.generation.answers import Answer
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.inputs.records import Prompt, PromptLike
from rlhf.maths.advantages import generalized_advantages
from rlhf.models.settings import ModelSettings
from rlhf.rewards.combined import RewardPart, WeightedReward
from rlhf.rewards.functions import FunctionReward, TokenFunctionReward
from rlhf.rewards.scores import Scored
from rlhf.rewards.settings import EnsembleSettings, PartSettings, RewardSettings
from rlhf.training.settings import OptimSettings
from stages.ppo.config import Config, PPOSettings, PtxSettings, RolloutSettings
from stages.ppo.load import make_value_model
from stages.ppo.metrics import rollout_metrics, rollout_sums
from stages.ppo.normalize import normalize_scores
from stages.ppo.rollout import RolloutWorker, roll_out
from stages.ppo.train import train
from tests.rlhf.answers import of_ids
from tests.rlhf.rewards.folders import (
    base_tokenizer,
    merging_tokenizer,
    save_base,
    save_reward_model,
)
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of, tiny_scalar_of

ROOT = Path(__file__).parents[2]
HERE = "tests.stages.test_ppo_rewards"
END = 1
SCALE_FIELDS = ("mean", "std", "per_token", "mean_tokens")


def prompt_length(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


def length(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    return [float(len(response)) for response in responses]


def early(
    prompts: list[PromptLike],
    responses: list[str],
    metas: list[dict[str, Any]],
    tokens: list[list[str]],
) -> list[list[float]]:
    """Give 1 for the first token, 2 for the second, and so on; -1 for an end."""
    return [
        [-1.0 if piece == "</s>" else 1.0 + t for t, piece in enumerate(pieces)]
        for pieces in tokens
    ]


def prompt_and_each(
    prompts: list[PromptLike],
    responses: list[str],
    metas: list[dict[str, Any]],
    tokens: list[list[str]],
) -> list[list[float]]:
    """Give 3 for each token; the first gets one more for each character of the prompt."""
    return [
        [3.0 + len(prompt), *[3.0] * (len(pieces) - 1)]
        for prompt, pieces in zip(prompts, tokens, strict=True)
    ]


def constant(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    return [0.1] * len(responses)


def make_config(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "output_dir": "unused",
        "policy": ModelSettings(path="unused"),
        "prompts": "unused",
        "reward": RewardSettings(function="unused:unused", missing_end="none"),
        "rollout": RolloutSettings(batch_size=8, max_new_tokens=6),
        "ppo": PPOSettings(mini_batch_size=4, kl_coef=0.1),
        "ptx": PtxSettings(coef=0.0),
        "optim": OptimSettings(learning_rate=1e-3, schedule="constant"),
        "num_updates": 2,
        "ema_decay": None,
    }
    return Config(**(settings | changes))


def make_sampler(reward: Any, config: Config | None = None) -> RolloutWorker:
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    packer = Packer(1000)
    return RolloutWorker(
        Chat(tokenizer), tiny_policy_of("llama"), reward, packer, config or make_config()
    )


FITTED = [
    FittedPrompt(Prompt(f"prompt {'x' * i}"), ids)
    for i, ids in enumerate([(10, 11, 12), (13,), (14, 15), (16, 17, 18, 19)] * 2)
]


def rollout_of(worker: RolloutWorker, prompts: Sequence[FittedPrompt[Prompt]] = FITTED) -> Any:
    return roll_out(
        tiny_policy_of("llama"),
        tiny_scalar_of("llama"),
        worker,
        prompts,
        torch.Generator().manual_seed(0),
        Accelerator(cpu=True),
    )


def test_rewards_of_tokens_stand_at_them_before_advantages_are_estimated() -> None:
    unwhitened = PPOSettings(mini_batch_size=4, kl_coef=0.1, whiten_advantages=False)
    config = make_config(ppo=unwhitened)
    chat = make_sampler(None).chat
    reward = WeightedReward(
        {
            "steps": RewardPart(TokenFunctionReward(early, "early", chat), 0.5),
            "length": RewardPart(FunctionReward(length, "length"), 2.0),
        }
    )
    rollout = rollout_of(make_sampler(reward, config))
    assert int(rollout.finished.sum()) in range(1, 8)
    for i, tree in enumerate(rollout.trees):
        tokens = tree.responses[0]
        steps = [-1.0 if token == END else 1.0 + t for t, token in enumerate(tokens)]
        in_full = 2.0 * len(chat.decode(tokens))
        expected = torch.tensor([0.5 * step for step in steps])
        expected[-1] += in_full
        found = rollout.rewards[i, : len(tokens)]  # there is no KL before the first update
        assert torch.allclose(found, expected, atol=1e-5)
        assert rollout.rewards[i, len(tokens) :].abs().sum() == 0
        assert rollout.scores[i].item() == pytest.approx(0.5 * sum(steps) + in_full)
        assert rollout.parts["steps"][i].item() == sum(steps)
    advantages, returns = generalized_advantages(
        rollout.rewards, rollout.values, rollout.response_mask, gamma=1.0, gae_lambda=0.95
    )
    assert torch.allclose(rollout.advantages, advantages, atol=1e-6)
    assert torch.allclose(rollout.returns, returns, atol=1e-6)


def test_parts_are_logged_as_means_and_follow_their_episodes() -> None:
    reward = WeightedReward(
        {
            "prompt": RewardPart(FunctionReward(prompt_length, "prompt"), -0.5),
            "length": RewardPart(FunctionReward(length, "length")),
            "none": RewardPart(FunctionReward(length, "length"), only_with="rules"),
            "odd": RewardPart(FunctionReward(prompt_length, "odd"), 0.0, only_with="odd"),
        }
    )
    fitted = [
        FittedPrompt(replace(one.record, meta={"odd": i % 2 == 1}), one.ids)
        for i, one in enumerate(FITTED)
    ]
    rollout = rollout_of(make_sampler(reward), fitted)
    lengths = [float(len(one.record.prompt)) for one in FITTED]
    assert rollout.parts["prompt"].tolist() == lengths
    metrics = rollout_metrics({k: float(v) for k, v in rollout_sums(rollout).items()})
    assert metrics["ppo/part/prompt"] == pytest.approx(sum(lengths) / 8)
    parts = -0.5 * metrics["ppo/part/prompt"] + metrics["ppo/part/length"]
    assert metrics["ppo/score"] == pytest.approx(parts, abs=1e-5)
    assert "ppo/part/none" not in metrics
    assert metrics["ppo/part/odd"] == pytest.approx(sum(lengths[1::2]) / 4)
    some = rollout.select(torch.tensor([5, 2]))
    assert some.parts["prompt"].tolist() == [lengths[5], lengths[2]]


def test_one_answer_is_a_share_of_different_prompts() -> None:
    """Two of four prompts get (7, 8), one of them for half of its samples: 1.5 of 4."""
    rollout = rollout_of(make_sampler(FunctionReward(length, "length")))
    trees = [
        PromptTree(prompt, (response,))
        for prompt, response in [
            ((1,), (7, 8)),
            ((1,), (9,)),
            ((2,), (7, 8)),
            ((2,), (7, 8)),
            ((3,), (4,)),
            ((4,), (7,)),
            ((4,), (8, 7)),
            ((4,), (8,)),
        ]
    ]
    sums = rollout_sums(replace(rollout, trees=trees))
    metrics = rollout_metrics({k: float(v) for k, v in sums.items()})
    assert metrics["ppo/one_answer"] == pytest.approx(1.5 / 4)


def test_scores_are_clipped_then_charged_for_length_then_for_a_missing_end() -> None:
    class Fixed:
        def score(self, *_: object) -> Scored:
            return Scored(torch.tensor([9.0, 9.0, -9.0, 0.5]))

    answers = [
        of_ids([5], ids, is_finished=ids[-1] == END)
        for ids in [(7, 7, 7, 7, END), (7, 7, 7, 7, 7), (7, END), (7,)]
    ]
    reward = RewardSettings(
        function="a:b",
        clip=2.0,
        length_penalty=0.25,
        length_allowance=3,
        missing_end="subtract",
        missing_end_value=1.0,
    )
    worker = make_sampler(Fixed(), make_config(reward=reward))
    assert worker.score(answers).scores.tolist() == [2 - 0.5, 2 - 0.5 - 1, -2.0, 0.5 - 1]
    replacing = replace(reward, missing_end="replace", missing_end_value=-3.0)
    worker = make_sampler(Fixed(), make_config(reward=replacing))
    assert worker.score(answers).scores.tolist() == [1.5, -3.0, -2.0, -3.0]


def normalized(function: Any, num_samples: int, value_model: Any, **changes: Any) -> Any:
    settings = RewardSettings(function="a:b", missing_end="none", normalize_on=num_samples)
    worker = make_sampler(FunctionReward(function, "f"), make_config(reward=settings, **changes))
    return normalize_scores(worker, value_model, FITTED, Accelerator(cpu=True))


def test_scores_of_the_reference_policy_get_mean_0_and_standard_deviation_1() -> None:
    worker, measured = normalized(length, 400, tiny_scalar_of("llama"))
    generator = torch.Generator().manual_seed(77)
    answers = worker.sample(worker.ref_policy, FITTED * 50, generator)
    scores = worker.score(answers).scores
    lengths = torch.tensor([float(len(answer.text)) for answer in answers])
    assert measured["raw_score_mean"] == pytest.approx(float(lengths.mean()), abs=0.3)
    assert scores.mean().item() == pytest.approx(0.0, abs=0.2)
    assert scores.std().item() == pytest.approx(1.0, abs=0.15)


def test_normalising_measures_each_prompt_in_turn_and_repeats_itself() -> None:
    lengths = torch.tensor([float(len(e.record.prompt)) for e in FITTED])
    _, measured = normalized(prompt_length, 8, tiny_scalar_of("llama"))
    assert measured["raw_score_mean"] == pytest.approx(lengths.mean().item())
    assert measured["raw_score_std"] == pytest.approx(lengths.std(correction=0).item())
    _, twice = normalized(prompt_length, 16, tiny_scalar_of("llama"))
    assert twice == pytest.approx(measured)
    # Most samples are cut at the limit; some of 39 are shorter with any seed.
    first, again = (normalized(length, 39, tiny_scalar_of("llama"))[1] for _ in range(2))
    assert first == again
    assert normalized(length, 39, tiny_scalar_of("llama"), seed=6)[1] != first


class LongerAndPrompt:
    """Scores 3 for each token, and -100 for each character of the prompt."""

    def score(self, answers: Sequence[Answer]) -> Scored:
        return Scored(
            torch.tensor([3.0 * len(one.response_ids) + self.rest(one) for one in answers])
        )

    @staticmethod
    def rest(one: Answer) -> float:
        return -100.0 * len(one.record.prompt)


def test_the_length_is_taken_out_as_it_differs_within_a_prompt() -> None:
    """Prompts differ in length too, so a line through all samples would have another slope."""
    settings = RewardSettings(
        function="a:b", missing_end="none", normalize_on=32, debias_length=True
    )
    worker = make_sampler(LongerAndPrompt(), make_config(reward=settings))
    value_model, accelerator = tiny_scalar_of("llama"), Accelerator(cpu=True)
    scaled, measured = normalize_scores(worker, value_model, FITTED, accelerator)
    assert measured["raw_score_per_token"] == pytest.approx(3.0)
    assert 1 < measured["raw_score_mean_tokens"] < 6
    answers = worker.sample(worker.ref_policy, FITTED * 10, torch.Generator().manual_seed(7))
    assert len({len(one.response_ids) for one in answers}) > 1
    found = scaled.score(answers).scores
    rest = torch.tensor([LongerAndPrompt.rest(one) for one in answers])
    prompts_only = (rest - rest.mean()) / rest.std(correction=0)
    assert torch.allclose(found, prompts_only, atol=1e-3)
    again, known = normalize_scores(worker, value_model, FITTED, accelerator, measured)
    assert known == measured
    assert again.score(answers).scores.equal(found)


def test_each_part_has_a_scale_of_the_prompts_that_it_judges() -> None:
    """Half of the prompts have rules. The rule scores 5 and 9 on them: mean 7, deviation 2.

    On the others the model scores -100 a character and 3 a token, and the 3 are taken out.
    """
    fives, nines = ({"rules": True, "worth": worth} for worth in (5.0, 9.0))
    metas: list[dict[str, Any]] = [{}, fives, {}, nines, {}, nines, {}, fives]
    fitted = [
        FittedPrompt(replace(one.record, meta=meta), one.ids)
        for one, meta in zip(FITTED, metas, strict=True)
    ]
    settings = RewardSettings(
        parts={
            "rule": PartSettings(function="a:b", weight=2.0, only_with="rules"),
            "model": PartSettings(
                model="rm", weight=-3.0, only_without="rules", debias_length=True
            ),
        },
        missing_end="none",
        normalize_on=32,
    )
    worth = FunctionReward(lambda prompts, responses, metas: [of["worth"] for of in metas], "worth")
    parts = {
        "rule": RewardPart(worth, 2.0, only_with="rules"),
        "model": RewardPart(LongerAndPrompt(), -3.0, only_without="rules"),
    }
    worker = make_sampler(WeightedReward(parts), make_config(reward=settings))
    value_model = tiny_scalar_of("llama")
    value_model.scale, value_model.bias = -3.0, 0.0
    accelerator = Accelerator(cpu=True)
    scaled, measured = normalize_scores(worker, value_model, fitted, accelerator)
    assert measured["raw_score_rule_mean"] == pytest.approx(7.0)
    assert measured["raw_score_rule_std"] == pytest.approx(2.0)
    assert measured["raw_score_model_per_token"] == pytest.approx(3.0)
    assert measured.keys() == {
        f"raw_score_{name}"
        for name in ("rule_mean", "rule_std", *(f"model_{field}" for field in SCALE_FIELDS))
    }
    answers = scaled.sample(scaled.ref_policy, fitted, torch.Generator().manual_seed(7))
    found = scaled.score(answers).scores
    assert found[[1, 3, 5, 7]].tolist() == pytest.approx([-2.0, 2.0, 2.0, -2.0])
    rest = torch.tensor([LongerAndPrompt.rest(one) for one in answers])[::2]
    prompts_only = (rest - rest.mean()) / rest.std(correction=0)
    assert torch.allclose(found[::2], -3.0 * prompts_only, atol=1e-3)
    # The value model predicts -3 times the model's score, on the scale of that part.
    mean, std = measured["raw_score_model_mean"], measured["raw_score_model_std"]
    assert value_model.scale == pytest.approx(-3.0 / std)
    assert value_model.scale * (10.0 - value_model.bias) == pytest.approx(-3 * (10.0 - mean) / std)
    again, known = normalize_scores(worker, value_model, fitted, accelerator, measured)
    assert known == measured
    assert again.score(answers).scores.equal(found)


@pytest.mark.parametrize(
    ("only_with", "message"),
    [
        ("rules", "part brief judges none of the samples for reward.normalize_on"),
        (None, "all 8 samples for reward.normalize_on score 0.1 by brief"),
    ],
)
def test_a_part_without_a_scale_is_named(only_with: str | None, message: str) -> None:
    settings = PartSettings(function="a:b", only_with=only_with)
    config = make_config(reward=RewardSettings(parts={"brief": settings}, normalize_on=8))
    part = RewardPart(FunctionReward(constant, "constant"), only_with=only_with)
    worker = make_sampler(WeightedReward({"brief": part}), config)
    with pytest.raises(ValueError, match=message):
        normalize_scores(worker, tiny_scalar_of("llama"), FITTED, Accelerator(cpu=True))


class Broken:
    """Scores nan, as a model with broken weights does."""

    def score(self, answers: Sequence[Answer]) -> Scored:
        return Scored(torch.full((len(answers),), torch.nan))


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_broken_reward_is_no_part_that_does_not_judge(in_parts: bool) -> None:
    source: dict[str, Any] = {"model": "rm"}
    reward: Any = Broken()
    if in_parts:
        source = {"parts": {"bad": PartSettings(model="rm"), "good": PartSettings(function="a:b")}}
        good = RewardPart(FunctionReward(prompt_length, "good"))
        reward = WeightedReward({"bad": RewardPart(reward), "good": good})
    config = make_config(reward=RewardSettings(normalize_on=8, **source))
    worker = make_sampler(reward, config)
    with pytest.raises(ValueError, match="score is not finite in phase normalize"):
        normalize_scores(worker, tiny_scalar_of("llama"), FITTED, Accelerator(cpu=True))


def test_answers_of_one_length_do_not_show_what_a_token_is_worth() -> None:
    settings = RewardSettings(function="a:b", normalize_on=8, debias_length=True)
    config = make_config(reward=settings, rollout=RolloutSettings(batch_size=8, max_new_tokens=1))
    worker = make_sampler(FunctionReward(length, "length"), config)
    with pytest.raises(ValueError, match="the two answers to each of 4 prompts have the same"):
        normalize_scores(worker, tiny_scalar_of("llama"), FITTED, Accelerator(cpu=True))


def test_the_value_model_stays_in_the_units_of_the_scores() -> None:
    value_model = tiny_scalar_of("llama")
    row = Packer(100).rows([PromptTree((5, 6), ((7, 8, 9),))])[0]
    with torch.no_grad():
        before = value_model(row.predictors, **row.model_inputs)
        _, measured = normalized(length, 16, value_model)
        after = value_model(row.predictors, **row.model_inputs)
    mean, std = measured["raw_score_mean"], measured["raw_score_std"]
    assert abs(mean) > 1 and abs(std - 1) > 0.1
    assert torch.allclose(after, (before - mean) / std, atol=1e-5)
    blank = tiny_scalar_of("llama")
    blank.bias = 0.0
    with torch.no_grad():
        blank.head.weight.zero_()
        normalized(length, 16, blank)
        assert blank(row.predictors, **row.model_inputs).tolist() == [0.0, 0.0, 0.0]


def test_scores_without_any_spread_cannot_be_normalised() -> None:
    with pytest.raises(ValueError, match=r"all 8 samples .* score 0\.1, .*tells responses apart"):
        normalized(constant, 8, tiny_scalar_of("llama"))


def test_without_the_setting_nothing_is_normalised() -> None:
    worker = make_sampler(FunctionReward(length, "length"))
    same, measured = normalize_scores(
        worker, tiny_scalar_of("llama"), FITTED, Accelerator(cpu=True)
    )
    assert same is worker and measured == {}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save sft, its reward models rm and rm2, and foreign, one of another vocabulary."""
    folder = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    save_base(folder / "sft", "llama", base_tokenizer())
    save_base(folder / "gpt2", "gpt2", merging_tokenizer())
    save_reward_model(folder / "rm", folder / "sft", seed=1, bias=0.5, scale=2.0)
    save_reward_model(folder / "rm2", folder / "sft", seed=2, bias=-0.25, scale=1.0)
    save_reward_model(folder / "foreign", folder / "gpt2", seed=3, bias=0.3, scale=1.5)
    rows = [{"prompt": "say " + "x" * i} for i in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def value_model_of(folders: Path, reward: RewardSettings, value_model: str | None = None) -> Any:
    config = make_config(
        policy=ModelSettings(path=str(folders / "sft")), reward=reward, value_model=value_model
    )
    return make_value_model(config, Chat(base_tokenizer()), Accelerator(cpu=True), bases=None)


def test_the_value_model_starts_as_the_first_reward_model_times_its_weight(folders: Path) -> None:
    rm, rm2 = str(folders / "rm"), str(folders / "rm2")
    single = value_model_of(folders, RewardSettings(model=rm))
    assert (single.bias, single.scale) == (0.5, 2.0)
    ensemble = RewardSettings(ensemble=EnsembleSettings(models=(rm2, rm)))
    assert value_model_of(folders, ensemble).bias == -0.25
    assert value_model_of(folders, ensemble, value_model=rm).bias == 0.5
    parts = {"flipped": PartSettings(model=rm, weight=-0.5), "other": PartSettings(model=rm2)}
    flipped = value_model_of(folders, RewardSettings(parts=parts))
    assert (flipped.bias, flipped.scale) == (0.5, -1.0)
    blank = value_model_of(folders, RewardSettings(function="a:b"))
    assert not blank.head.weight.any()


def test_a_value_model_of_another_vocabulary_is_no_start(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = str(folders / "foreign")
    blank = value_model_of(folders, RewardSettings(model=foreign))
    assert not blank.head.weight.any()
    line = capsys.readouterr().out.strip()
    assert line.count("\n") == 0 and f"{foreign} has another vocabulary than the policy" in line
    with pytest.raises(ValueError, match=r"value_model .*foreign has another vocabulary"):
        value_model_of(folders, RewardSettings(model=str(folders / "rm")), value_model=foreign)


def run_config(folders: Path, output: Path, reward: RewardSettings) -> Config:
    return make_config(
        output_dir=str(output),
        policy=ModelSettings(path=str(folders / "sft")),
        prompts=str(folders / "prompts.jsonl"),
        prompts_held_out=str(folders / "prompts.jsonl"),
        reward=reward,
        rollout=RolloutSettings(batch_size=8, max_prompt_tokens=60, max_new_tokens=6),
    )


def test_a_run_with_all_kinds_of_parts(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reward = RewardSettings(
        parts={
            "helpful": PartSettings(model=str(folders / "rm")),
            "foreign": PartSettings(model=str(folders / "foreign"), weight=0.5),
            "brief": PartSettings(function=f"{HERE}:length", weight=-0.1),
            "early": PartSettings(function=f"{HERE}:early", per_token=True, weight=0.01),
        },
        normalize_on=64,
        missing_end="none",
    )
    train(run_config(folders, tmp_path / "ppo", reward))
    assert "the reward model reads text: " in capsys.readouterr().out
    rows = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").open()]
    results = json.loads((tmp_path / "ppo/results.json").read_text())
    for row in rows:
        parts = {n.removeprefix("ppo/part/"): v for n, v in row.items() if "/part/" in n}
        assert list(parts) == ["helpful", "foreign", "brief", "early"]
        weights = {"helpful": 1.0, "foreign": 0.5, "brief": -0.1, "early": 0.01}
        score = 0.0
        for part, weight in weights.items():
            mean, std = (results[f"raw_score_{part}_{field}"] for field in ("mean", "std"))
            score += weight * (parts[part] - mean) / std
        assert row["ppo/score"] == pytest.approx(score, abs=1e-4)
    assert results["part/brief"] == rows[-1]["ppo/part/brief"]
    lineage = json.loads((tmp_path / "ppo/lineage.json").read_text())
    assert {"reward.parts.helpful", "reward.parts.foreign"} < set(lineage["inputs"])


def test_a_run_with_an_ensemble(folders: Path, tmp_path: Path) -> None:
    members = (str(folders / "rm"), str(folders / "rm2"))
    ensemble = EnsembleSettings(models=members, combine="mean_minus_spread", spread_coef=0.5)
    reward = RewardSettings(ensemble=ensemble, missing_end="none")
    train(run_config(folders, tmp_path / "ppo", reward))
    for line in (tmp_path / "ppo/metrics.jsonl").open():
        row = json.loads(line)
        mean = (row["ppo/part/member_0"] + row["ppo/part/member_1"]) / 2
        assert row["ppo/part/spread"] > 0
        assert row["ppo/score"] == pytest.approx(mean - 0.5 * row["ppo/part/spread"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_measure_the_same_scale_as_one(folders: Path, tmp_path: Path) -> None:
    """Both take out the 3 that each token is worth, which leaves the prompt's length only."""
    settings = str(ROOT / "configs/accelerate/cpu2.yaml")
    launch = ["-m", "accelerate.commands.launch", "--quiet", "--config_file", settings]
    both = {"function": f"{HERE}:prompt_and_each", "per_token": True, "debias_length": True}
    parts = {"both": both, "prompt": {"function": f"{HERE}:prompt_length"}}
    found: list[tuple[float, float]] = []
    for start in ([], launch):
        output = tmp_path / str(len(found))
        words = {
            "output_dir": output,
            "policy.path": folders / "sft",
            "prompts": folders / "prompts.jsonl",
            "reward.parts": json.dumps(parts),
            "reward.normalize_on": 16,
            "ptx.coef": 0,
            "rollout.batch_size": 8,
            "rollout.max_prompt_tokens": 60,
            "rollout.max_new_tokens": 12,
            "ppo.mini_batch_size": 8,
            "num_updates": 1,
        }
        options = [word for key, value in words.items() for word in (f"--{key}", str(value))]
        command = [sys.executable, *start, "-m", "stages.ppo", *options]
        subprocess.run(command, cwd=ROOT, check=True)
        results = json.loads((output / "results.json").read_text())
        raw = {k.removeprefix("raw_score_"): v for k, v in results.items() if "raw_score" in k}
        in_tokens = 3 * raw["both_mean_tokens"]
        found.append((raw["both_mean"] - in_tokens, raw["both_std"]))
        assert raw["both_per_token"] == pytest.approx(3.0)
        assert (raw["prompt_mean"], raw["prompt_std"]) == pytest.approx(found[-1])
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx((7.5, (63 / 12) ** 0.5))
