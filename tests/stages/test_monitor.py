"""Injects faults into real runs of the PPO stage; each must raise the alarm of its code.

The runs are of a tiny Llama on the CPU; a test breaks one thing and looks for the code in the
error, or in results.json and the output where the alarm only warns.
"""

import json
import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import rlhf.generation.hf
import stages.ppo.learner
import stages.ppo.load
import stages.ppo.rollout
import stages.ppo.train
from rlhf.generation.hf import LoopEngine
from rlhf.generation.interface import Samples
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import PromptTree
from rlhf.inputs.records import PromptLike
from rlhf.models.layout import packer_for
from rlhf.models.loading import load_scalar
from rlhf.models.passes import compute_scores
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.models import GoldenRow, RewardCard
from rlhf.rewards.rendering import rendering_hash
from rlhf.rewards.scores import Scored
from rlhf.rewards.settings import RewardSettings
from rlhf.training.settings import OptimSettings
from stages.ppo.config import Config, MonitorSettings, PPOSettings
from stages.ppo.metrics import describe_differences
from stages.ppo.monitor import (
    CODES,
    NONFINITE,
    RM_CHANCE,
    RULES,
    TOKEN_NOISE,
    Monitor,
    TrainingStopped,
    ratio_is_not_one,
)
from stages.ppo.rollout import Rollout
from stages.ppo.train import train

Distribution = Callable[[Tensor, float], Tensor]
"""Takes logits (rows, vocab) and a temperature; gives the probabilities to draw from."""


@pytest.fixture
def config(ppo_config: Config) -> Config:
    return ppo_config


def constant(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    return [1.0] * len(responses)


def huge(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    return [1000.0 * (len(response) % 5) for response in responses]


def alarms_of(config: Config) -> dict[str, Any]:
    train(config)
    return json.loads((Path(config.output_dir) / "results.json").read_text())["alarms"]


def break_from(
    update: int, function: Callable[..., Any], broken: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that calls `function` a number of times, and `broken` after that."""
    calls = iter(range(10**9))
    return lambda *args, **kwargs: (function if next(calls) < update else broken)(*args, **kwargs)


def test_a_healthy_run_raises_no_alarm(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert alarms_of(config) == {}
    assert "warning" not in capsys.readouterr().out
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").open()]
    assert [row["ppo/alarms"] for row in rows] == [0.0] * config.num_updates
    tried = {rule.code for rule in RULES if all(name in rows[-1] for name in rule.needs)}
    assert tried == {rule.code for rule in RULES}  # every rule gets the metrics that it needs


def test_sampled_tokens_of_a_healthy_run_are_as_likely_as_they_should_be(config: Config) -> None:
    train(replace(config, rollout=replace(config.rollout, batch_size=256)))
    rows = [json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").open()]
    assert all(abs(row["ppo/sampler_z"]) < 4 for row in rows)
    assert all(0 < row["ppo/sampler_difference"] < 1e-5 for row in rows)  # computed by another pass
    # Standard errors have the right size if their root mean square over updates is about one.
    assert 0.2 < math.sqrt(sum(row["ppo/sampler_z"] ** 2 for row in rows) / len(rows)) < 2.5


def test_an_update_that_is_not_checked_takes_the_sampler_at_its_word(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is the same up to rounding, with one pass less in three of four updates."""
    passes: list[int] = []
    moments = stages.ppo.rollout.compute_moments

    def counted(*args: Any, **options: Any) -> Any:
        passes.append(1)
        return moments(*args, **options)

    monkeypatch.setattr(stages.ppo.rollout, "compute_moments", counted)
    rows: dict[int, list[dict[str, float]]] = {}
    for every in (1, 3):
        folder = Path(config.output_dir) / str(every)
        rollout = replace(config.rollout, check_every=every)
        train(replace(config, rollout=rollout, output_dir=str(folder)))
        rows[every] = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert len(passes) == config.num_updates + 2
    only_checked = {"ppo/entropy", "ppo/sampler_difference", "ppo/sampler_difference_high"}
    only_checked |= {"ppo/sampler_excess", "ppo/sampler_z"}
    assert ["ppo/entropy" in row for row in rows[3]] == [True, False, False, True]
    assert rows[1][1].keys() - rows[3][1].keys() == only_checked | {"seconds/logprobs"}
    for always, now_and_then in zip(rows[1], rows[3], strict=True):
        assert always["ppo/first_log_ratio"] < 1e-6
        assert now_and_then["ppo/first_log_ratio"] < 1e-5
        for name in ("ppo/score", "ppo/kl", "ppo/reward", "ppo/value_loss", "ppo/policy_grad_norm"):
            assert now_and_then[name] == pytest.approx(always[name], rel=1e-3, abs=1e-4)
    assert rows[3][1]["ppo/first_log_ratio"] > 0  # from two ways to compute it
    flops = [row["ppo/model_flops_utilisation"] / row["ppo/tokens_per_second"] for row in rows[3]]
    assert flops[1] / flops[0] == pytest.approx(0.9, abs=0.03)  # 9 of 10 passes; 6 are training


def test_a_sampler_that_is_not_the_policy_shows_in_the_first_ratio_too(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = rlhf.generation.hf._sample
    broken = break_from(8, sample, sampler(cold, is_honest=True))  # the first rollout's 8 tokens
    monkeypatch.setattr(rlhf.generation.hf, "_sample", broken)
    rollout = replace(config.rollout, check_every=10)
    with pytest.raises(TrainingStopped, match=r"^PPO_RATIO at update 1: .* 0\.0002 and 0\.002"):
        train(replace(config, rollout=rollout))


@pytest.mark.parametrize(
    "changes",
    [
        {"generation": GenerationSettings(engine="vllm")},
        {"policy": "bfloat16"},
        {"ppo": PPOSettings(mini_batch_size=16, clip_range=0.001)},
    ],
)
def test_a_sampler_as_far_from_the_trainer_as_a_clip_is_always_checked(
    changes: dict[str, Any], config: Config
) -> None:
    if "policy" in changes:
        changes = {"policy": replace(config.policy, dtype="bfloat16")}
    rollout = replace(config.rollout, check_every=2)
    with pytest.raises(ValueError, match=r"^rollout\.check_every is 2, but .* give 1"):
        train(replace(config, rollout=rollout, **changes))


def test_a_reference_that_is_another_model(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    load_policy = stages.ppo.load.load_policy
    monkeypatch.setattr(
        stages.ppo.load,
        "load_policy",
        break_from(1, load_policy, lambda *a, **k: other(load_policy(*a, **k))),
    )
    with pytest.raises(TrainingStopped, match=r"^PPO_REFERENCE at update 0: .* differs from its"):
        train(config)


def other(policy: PreTrainedModel) -> PreTrainedModel:
    assert isinstance(policy, LlamaForCausalLM)
    with torch.no_grad():
        policy.lm_head.weight.mul_(1.5)
    return policy


def top_k(logits: Tensor, temperature: float) -> Tensor:
    likeliest = logits.topk(40).indices
    kept = torch.full_like(logits, -math.inf).scatter(-1, likeliest, logits.gather(-1, likeliest))
    return kept.softmax(-1)


def top_p(logits: Tensor, temperature: float) -> Tensor:
    probabilities, order = logits.softmax(-1).sort(descending=True)
    probabilities[probabilities.cumsum(-1) - probabilities > 0.8] = 0
    return torch.zeros_like(logits).scatter(-1, order, probabilities)


def cold(logits: Tensor, temperature: float) -> Tensor:
    return (logits / 0.5).softmax(-1)


def sampler(distribution: Distribution, *, is_honest: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """Draw from `distribution`; report its log-probabilities if honest, else the softmax's."""

    def sample(
        logits: Tensor, temperature: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        drawn_from = distribution(logits, temperature)
        drawn_from = drawn_from / drawn_from.sum(-1, keepdim=True)
        tokens = torch.multinomial(drawn_from, 1, generator=generator)
        reported = drawn_from if is_honest else logits.softmax(-1)
        return tokens.squeeze(1), reported.gather(-1, tokens).squeeze(1).log()

    return sample


@pytest.mark.parametrize("distribution", [top_k, top_p, cold])
def test_a_sampler_that_is_not_the_policy(
    distribution: Distribution, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sampler(distribution, is_honest=True)
    monkeypatch.setattr(rlhf.generation.hf, "_sample", sample)
    with pytest.raises(TrainingStopped, match=r"^PPO_SAMPLER at update 0: Sampler and trainer"):
        train(config)


@pytest.mark.slow
@pytest.mark.parametrize("num_runs", [3, pytest.param(20, marks=pytest.mark.long)])
def test_healthy_runs_in_bfloat16_raise_no_alarm(num_runs: int, config: Config) -> None:
    """Most processors round more in it than in float32, which rules that stop must allow for."""
    policy = replace(config.policy, dtype="bfloat16")
    for seed in range(num_runs):
        folder = Path(config.output_dir) / str(seed)
        one = replace(config, policy=policy, seed=seed, output_dir=str(folder), num_updates=2)
        assert alarms_of(one) == {}
        weights = load_file(folder / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_a_wrong_temperature_in_bfloat16_stops_the_first_update(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sampler(cold, is_honest=True)
    monkeypatch.setattr(rlhf.generation.hf, "_sample", sample)
    with pytest.raises(TrainingStopped, match=r"^PPO_SAMPLER at update 0: Sampler and trainer"):
        train(replace(config, policy=replace(config.policy, dtype="bfloat16")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_token_far_off_among_many_is_no_alarm(dtype: str, config: Config) -> None:
    """The largest of 100,000 differences proves nothing; one in a thousand does, or the mean."""
    accelerator, noise = Accelerator(cpu=True), TOKEN_NOISE[dtype]
    small = torch.full((100_000,), noise.mean / 2)
    one_far, many_far = small.clone(), small.clone()
    one_far[7] = -40 * noise.high
    many_far[:200] = -2 * noise.high  # two in a thousand
    for apart, is_alarm in ((one_far, False), (many_far, True), (3 * small, True)):
        found = describe_differences("ppo/first_log_ratio", apart, accelerator)
        now = found | {"ppo/sampler_difference": 0.0}
        monitor = Monitor(config, print, noise)
        assert (ratio_is_not_one(now, monitor) is not None) == is_alarm
    assert found["ppo/first_log_ratio"] == pytest.approx(1.5 * noise.mean)


@pytest.mark.parametrize("distribution", [top_k, top_p, cold])
def test_a_sampler_that_says_it_is_the_policy(
    distribution: Distribution, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = sampler(distribution, is_honest=False)
    monkeypatch.setattr(rlhf.generation.hf, "_sample", sample)
    with pytest.raises(TrainingStopped, match=r"^PPO_SAMPLER at update \d: .* nats likelier"):
        train(replace(config, rollout=replace(config.rollout, batch_size=256)))


def test_a_sampler_whose_weights_are_one_update_old(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sampler gets new weights at the first rollout only."""
    refresh = LoopEngine.refresh

    def refresh_once(engine: LoopEngine, policy: PreTrainedModel) -> None:
        if not hasattr(engine, "policy"):
            refresh(engine, deepcopy(policy))

    monkeypatch.setattr(LoopEngine, "refresh", refresh_once)
    with pytest.raises(TrainingStopped, match=r"^PPO_SAMPLER at update 1: Sampler and trainer"):
        train(config)


def test_a_kl_below_zero(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first update the reference's log-probabilities are not normalised."""
    logprobs = stages.ppo.rollout.RolloutWorker.logprobs
    monkeypatch.setattr(
        stages.ppo.rollout.RolloutWorker,
        "logprobs",
        break_from(1, logprobs, lambda *args: logprobs(*args) + 0.1),
    )
    with pytest.raises(TrainingStopped, match=r"^PPO_NEG_KL at update 1: .* never negative"):
        train(config)


def test_a_training_pass_that_is_not_the_policy_that_sampled(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    logprobs = stages.ppo.learner.response_logprobs
    monkeypatch.setattr(
        stages.ppo.learner,
        "response_logprobs",
        lambda policy, row, temperature: logprobs(policy, row, 1.5),
    )
    with pytest.raises(
        TrainingStopped,
        match=r"^PPO_RATIO at update 0: .*new probabilities.* 0\.0001 and 0\.001",
    ):
        train(config)
    good = load_file(Path(config.output_dir) / "last_good" / "model.safetensors")
    start = load_file(Path(config.policy.path) / "model.safetensors")
    assert all(torch.equal(good[name], start[name]) for name in start), "no step was taken"


def test_a_code_that_is_not_to_stop_warns_once_and_is_counted(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    logprobs = stages.ppo.learner.response_logprobs
    monkeypatch.setattr(
        stages.ppo.learner,
        "response_logprobs",
        lambda policy, row, temperature: logprobs(policy, row, 1.5),
    )
    alarms = alarms_of(replace(config, monitor=replace(config.monitor, stop_on=[])))
    assert alarms["PPO_RATIO"] == {"first_update": 0, "updates": config.num_updates}
    rows = [json.loads(line) for line in (Path(config.output_dir) / "alarms.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(config.num_updates))
    assert {row["code"] for row in rows} == {"PPO_RATIO"}
    assert rows[0]["message"].startswith("In the first step on a rollout the new probabilities")
    assert capsys.readouterr().out.count("warning PPO_RATIO at update 0") == 1


def test_responses_that_never_end(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = rlhf.generation.hf._sample

    def never_end(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        logits[:, 1] = -math.inf
        return sample(logits, *args)

    monkeypatch.setattr(rlhf.generation.hf, "_sample", never_end)
    monitor = MonitorSettings(stop_on=["PPO_NO_EOS"])
    with pytest.raises(TrainingStopped, match=r"^PPO_NO_EOS at update 0: Only 0% .* 8 tokens"):
        train(replace(config, monitor=monitor))


def test_scores_that_are_all_equal(config: Config) -> None:
    reward = RewardSettings(function="tests.stages.test_monitor:constant", missing_end="none")
    alarms = alarms_of(replace(config, reward=reward))
    assert alarms["PPO_ZERO_ADV"]["updates"] == config.num_updates


def test_advantages_that_are_all_zero(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    advantages = stages.ppo.rollout.generalized_advantages
    monkeypatch.setattr(
        stages.ppo.rollout,
        "generalized_advantages",
        lambda rewards, values, mask, **kw: (
            advantages(rewards, values, mask, **kw)[0] * 0,
            values,
        ),
    )
    assert alarms_of(config)["PPO_ZERO_ADV"]["updates"] == config.num_updates


def always(response: list[int]) -> Callable[..., Samples]:
    """Make an engine that gives one answer to every prompt."""

    def generate(engine: LoopEngine, prompts: Sequence[Sequence[int]], *_: object) -> Samples:
        logprobs = [[0.0] * len(response)] * len(prompts)
        return Samples([response] * len(prompts), logprobs)

    return generate


def test_responses_that_shrink(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = LoopEngine.generate
    monkeypatch.setattr(LoopEngine, "generate", break_from(2, generate, always([5])))
    monitor = replace(config.monitor, stop_on=["PPO_LENGTH"])
    with pytest.raises(TrainingStopped, match=r"^PPO_LENGTH at update 2: .*1\.0 tokens"):
        train(replace(config, monitor=monitor))


def test_responses_that_repeat_themselves(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = LoopEngine.generate
    monkeypatch.setattr(LoopEngine, "generate", break_from(2, generate, always([5, 6] * 4)))
    monitor = replace(config.monitor, stop_on=["PPO_REPEAT"])
    with pytest.raises(TrainingStopped, match=r"^PPO_REPEAT at update 2: .*repeats itself"):
        train(replace(config, monitor=monitor))


def test_one_answer_to_every_prompt(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = LoopEngine.generate
    monkeypatch.setattr(LoopEngine, "generate", break_from(2, generate, always([5, 6, 7])))
    monitor = replace(config.monitor, stop_on=["PPO_ONE_ANSWER"])
    with pytest.raises(
        TrainingStopped, match=r"^PPO_ONE_ANSWER at update 2: .*goes to \d\d\.\d% of the different"
    ):
        train(replace(config, monitor=monitor))


def test_an_answer_that_many_prompts_had_from_the_start_is_no_alarm(config: Config) -> None:
    told: list[str] = []
    monitor = Monitor(config, told.append, TOKEN_NOISE["float32"])
    # The odds are 0.667 at first, 1.94 at 0.66, and 2.28 at the mean of 0.66, 0.66, 0.66 and 0.8.
    for share in [0.4, *[0.66] * 4, 0.8]:
        metrics = {"ppo/one_answer": share}
        monitor.inspect(metrics)
        monitor.end_update(metrics)
    assert monitor.alarms == {"PPO_ONE_ANSWER": {"first_update": 5, "updates": 1}}
    assert "to 69.5% of the different prompts, mean of 4 updates" in told[0]
    assert "in the first update to 40.0%" in told[0]


@pytest.mark.parametrize("code", ["PPO_CLIP", "PPO_UPDATE_KL", "PPO_KL"])
def test_steps_that_are_far_too_long(code: str, config: Config) -> None:
    monitor = replace(
        config.monitor, stop_on=[code], max_kl=8.0
    )  # responses of a few tokens cannot get far
    wild = replace(
        config,
        optim=OptimSettings(learning_rate=0.3, schedule="constant"),
        ppo=replace(config.ppo, num_epochs=4, kl_coef=0.0),
        monitor=monitor,
        num_updates=8,
    )
    with pytest.raises(TrainingStopped, match=rf"^{code} at update"):
        train(wild)


def test_a_value_loss_that_explodes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    score = stages.ppo.rollout.RolloutWorker.score

    def jump(*args: Any) -> Scored:
        scored = score(*args)
        return replace(scored, scores=scored.scores + 100)

    monkeypatch.setattr(stages.ppo.rollout.RolloutWorker, "score", break_from(3, score, jump))
    monitor = replace(config.monitor, stop_on=["PPO_VALUE"])
    with pytest.raises(TrainingStopped, match=r"^PPO_VALUE at update 3: .*10 times"):
        train(replace(config, monitor=monitor))


def test_a_reward_far_beyond_the_value_clip(config: Config) -> None:
    wide = replace(
        config,
        reward=RewardSettings(function="tests.stages.test_monitor:huge"),
        ppo=replace(config.ppo, value_clip_range=0.2),
        monitor=replace(config.monitor, stop_on=["PPO_VALUE_CLIP"]),
    )
    with pytest.raises(TrainingStopped, match=r"^PPO_VALUE_CLIP at update 0: .*value_clip_range"):
        train(wide)


def test_a_nan_in_training_stops_before_the_step_and_leaves_a_replay(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities turn NaN in the second update; the weights on disk are those before it."""
    forward = stages.ppo.learner.response_logprobs
    passes_of_one_update = 2  # one in each step
    broken = break_from(passes_of_one_update, forward, lambda *args: forward(*args) * math.nan)
    monkeypatch.setattr(stages.ppo.learner, "response_logprobs", broken)
    with pytest.raises(TrainingStopped) as stopped:
        train(config)
    message = str(stopped.value)
    assert message.startswith(
        "PPO_NONFINITE at update 1: logprobs is not finite in phase train of step 2 "
    )
    assert "say " in message  # the prompt
    folder = Path(config.output_dir)
    assert str(folder / "last_good") in message
    (row,) = [json.loads(line) for line in (folder / "alarms.jsonl").open()]
    assert row["code"] == "PPO_NONFINITE" and row["message"] in message
    replay = json.loads((folder / "nonfinite.json").read_text())
    assert [replay[key] for key in ("update", "step", "phase", "tensor")] == [
        1,
        2,
        "train",
        "logprobs",
    ]
    assert "say " in replay["prompt_text"] and replay["responses"][0]
    good = stages.ppo.load.load_policy(ModelSettings(path=str(folder / "last_good")))
    assert all(parameter.isfinite().all() for parameter in good.parameters())
    start = stages.ppo.load.load_policy(config.policy)
    assert not torch.equal(good.lm_head.weight, start.lm_head.weight)  # one update was taken
    assert not (folder / "results.json").exists()


@pytest.mark.parametrize("tensor", ["scores", "values", "ref_logprobs"])
def test_a_nan_in_the_rollout_is_named(
    tensor: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    roll_out = stages.ppo.train.roll_out

    def broken(*args: Any, **options: Any) -> Rollout:
        rollout = roll_out(*args, **options)
        spoilt = getattr(rollout, tensor).clone()
        spoilt[3] = math.nan
        return replace(rollout, **{tensor: spoilt})

    monkeypatch.setattr(stages.ppo.train, "roll_out", broken)
    with pytest.raises(TrainingStopped, match=rf"^PPO_NONFINITE at update 0: {tensor} is not"):
        train(config)


def test_a_policy_without_finite_logits_is_told_at_its_first_sample(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_policy = stages.ppo.load.load_policy

    def spoilt(*args: Any, **kwargs: Any) -> PreTrainedModel:
        policy = load_policy(*args, **kwargs)
        with torch.no_grad():
            policy.lm_head.weight[7] = math.nan
        return policy

    monkeypatch.setattr(stages.ppo.load, "load_policy", spoilt)
    with pytest.raises(TrainingStopped, match=r"^PPO_NONFINITE at update 0: logits .*rollout"):
        train(config)


def test_a_reward_model_that_may_be_a_coin(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "rm"
    save_reward_model(Path(config.policy.path), folder, interval=(0.48, 0.55))
    reward = RewardSettings(model=str(folder), allow_chance_reward=True)
    alarms = alarms_of(replace(config, reward=reward))
    assert alarms["PPO_RM_CHANCE"] == {"first_update": 0, "updates": 1}
    assert "warning PPO_RM_CHANCE at update 0: The reward model" in capsys.readouterr().out


def save_reward_model(sft: Path, folder: Path, interval: tuple[float, float]) -> None:
    model = load_scalar(ModelSettings(path=str(sft)), new_head=True)
    chat = Chat(load_tokenizer(str(sft)))
    tree = PromptTree(tuple(chat.prompt_ids("say 1")), (tuple(chat.response_ids("one")),))
    score = compute_scores(model, [tree], packer_for(model.classifier, 512)).item()
    model.save(folder, chat.tokenizer)
    RewardCard(
        bias=0.0,
        scale=1.0,
        pair_accuracy=0.5,
        interval=interval,
        golden=(GoldenRow(prompt="say 1", response="one", score=score),),
        template_hash=chat.template_hash,
        rendering_hash=rendering_hash(chat),
    ).save(folder)


def test_every_code_has_its_fault_in_this_file() -> None:
    tests = Path(__file__).read_text()
    assert [code for code in CODES if code not in tests] == []
    assert {rule.code for rule in RULES} | {NONFINITE, RM_CHANCE} == set(CODES)


def test_an_unknown_code_is_refused(config: Config) -> None:
    monitor = MonitorSettings(stop_on=["PPO_EOS"])
    with pytest.raises(
        ValueError, match=r"stop_on has 'PPO_EOS', which is not the code of an alarm; give some of"
    ):
        Monitor(replace(config, monitor=monitor), print, TOKEN_NOISE["float32"])
