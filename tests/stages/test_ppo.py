"""Tests the PPO stage: its gradient, its checks at the first step, and a run that must learn."""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import cycle, islice, repeat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

import rlhf.runs.stopwatch
import stages.ppo.learner
import stages.ppo.rollout
import stages.ppo.setup
import stages.ppo.train
from rlhf.generation.answers import Answer
from rlhf.generation.hf import LoopEngine
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.fitting import FittedPrompt
from rlhf.inputs.packing import Layout, Packer, PromptTree, text_tree
from rlhf.inputs.records import Prompt, PromptLike
from rlhf.models.passes import compute_logprobs, compute_values
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.rewards.scores import Scored
from rlhf.rewards.settings import RewardSettings
from rlhf.training.optim import MovingAverage
from rlhf.training.settings import OptimSettings
from rlhf.training.sharding import local_gradients
from rlhf.training.step import make_train_state
from stages.ppo.config import Config, PPOSettings, PtxSettings, RolloutSettings
from stages.ppo.data import text_blocks
from stages.ppo.learner import POLICY, Learner, PolicyAndValue
from stages.ppo.progress import last_line
from stages.ppo.rollout import Rollout, RolloutWorker, roll_out
from stages.ppo.train import train
from stages.ppo.update import update
from tests.rlhf.plain_loading import load_with_report
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of, tiny_scalar_of
from tests.stages.conftest import is_timing
from tools.plan.launch import Launch
from tools.plan.make import make_plan

END = 1
PHASES = (
    "rollout score logprobs reference value advantages metrics ptx train step evaluate update"
).split()
TEXTS = [text_tree([5, 9, 13, 17, 21, 25]), text_tree([30, 31, 32])]


class CountingReward:
    """Gives one point for every token 7."""

    def score(self, answers: Sequence[Answer]) -> Scored:
        counts = [float(sum(token == 7 for token in one.response_ids)) for one in answers]
        return Scored(torch.tensor(counts))


def share_of_e(
    prompts: list[PromptLike], responses: list[str], metas: list[dict[str, Any]]
) -> list[float]:
    """Return ten times the share of each response's characters that are `e`."""
    return [10 * response.count("e") / max(len(response), 1) for response in responses]


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


def make_learner(config: Config, budget: int = 1000, architecture: str = "llama") -> Learner:
    accelerator = Accelerator(cpu=True)
    policy, value_model = tiny_policy_of(architecture), tiny_scalar_of(architecture)
    groups = [(policy, config.optim.learning_rate), (value_model, config.value_learning_rate)]
    average = None if config.ema_decay is None else MovingAverage(policy, config.ema_decay)
    state = make_train_state(
        PolicyAndValue(policy, value_model),
        groups,
        config.optim,
        100,
        accelerator,
        {POLICY: config.value_warmup_steps},
    )
    state.average = average
    return Learner(state, Packer(budget))


def make_rollout(
    learner: Learner, config: Config, log: Callable[[str], object] = print, **options: Any
) -> Rollout:
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    chat = Chat(tokenizer)
    models = learner.models
    ref_policy = tiny_policy_of(models.policy.config.model_type)
    worker = RolloutWorker(chat, ref_policy, CountingReward(), learner.packer, config, log=log)
    prompts = cycle([(10, 11, 12), (13,), (14, 15), (16, 17, 18, 19)])
    episodes = [
        FittedPrompt(Prompt("unused"), ids) for ids in islice(prompts, config.rollout.batch_size)
    ]
    generator = torch.Generator().manual_seed(2)  # with this seed some of the responses end
    accelerator = learner.state.accelerator
    return roll_out(
        models.policy, models.value_model, worker, episodes, generator, accelerator, **options
    )


def test_every_declared_end_finishes_a_response_and_the_reward_reads_the_templates_own() -> None:
    seen: list[tuple[int, ...]] = []

    class NotingReward(CountingReward):
        def score(self, answers: Sequence[Answer]) -> Scored:
            seen.extend(answer.ids_ending_with(END) for answer in answers)
            return super().score(answers)

    other = 40
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    chat = Chat(tokenizer, other_ends=[other])
    config = make_config(
        rollout=RolloutSettings(batch_size=8, max_new_tokens=24),
        reward=RewardSettings(
            function="unused:unused", missing_end="replace", missing_end_value=-9.0
        ),
    )
    worker = RolloutWorker(chat, tiny_policy_of("llama"), NotingReward(), Packer(1000), config)
    prompts = [FittedPrompt(Prompt("unused"), (10, 11, 12))] * 64
    answers = worker.sample(worker.ref_policy, prompts, torch.Generator().manual_seed(2))
    responses = [answer.response_ids for answer in answers]
    assert not any({END, other} & set(response[:-1]) for response in responses)
    assert {END, other} <= {response[-1] for response in responses}
    scores = worker.score(answers).scores
    finished = [answer.is_finished for answer in answers]
    assert finished == [response[-1] in (END, other) for response in responses]
    assert (scores == -9).tolist() == [not ended for ended in finished]
    assert {ids[-1] for ids, ended in zip(seen, finished, strict=True) if ended} == {END}


@pytest.mark.parametrize(
    ("copies", "is_checked", "expected"),
    [
        (False, True, "whole refresh generate release check split"),
        (False, False, "whole refresh generate release split"),
        (True, True, "refresh generate release whole check split"),
        (True, False, "refresh generate release"),
    ],
)
def test_the_policy_is_whole_for_an_engine_and_a_pass_that_read_it(
    copies: bool, is_checked: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine gets the weights once a rollout, and is released before the next pass."""
    calls: list[str] = []

    def noted(owner: Any, name: str) -> None:
        method = getattr(owner, name)

        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return method(*args, **options)

        monkeypatch.setattr(owner, name, call)

    @contextmanager
    def gather(part: nn.Module) -> Iterator[None]:
        is_policy = part is learner.models.policy
        calls.extend(["whole"] * is_policy)
        yield
        calls.extend(["split"] * is_policy)

    for name in ("refresh", "generate", "release"):
        noted(LoopEngine, name)
    noted(RolloutWorker, "check")
    monkeypatch.setattr(LoopEngine, "copies_weights", copies)
    config = make_config()
    learner = make_learner(config)
    make_rollout(learner, config, gather=gather, is_checked=is_checked)
    assert " ".join(calls) == expected


def test_a_long_rollout_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    learner = make_learner(config)
    told: list[str] = []
    make_rollout(learner, config, told.append)
    assert told == []
    monkeypatch.setattr(rlhf.runs.stopwatch, "HEARTBEAT_SECONDS", 0.0)
    make_rollout(learner, config, told.append)
    assert re.fullmatch(r"ppo: sampled \d of 8 after \d+ s", told[0])
    assert re.fullmatch(r"ppo: sampled 8 of 8 after \d+ s", told[-1])


def take_step(
    learner: Learner,
    rollout: Rollout,
    texts: list[PromptTree],
    config: Config,
    teacher: nn.Module | None = None,
) -> tuple[dict[str, float], torch.Tensor]:
    """Take one step on all episodes of a rollout; return its metrics and its gradient."""
    size = len(rollout.trees)
    one_step = replace(
        config,
        rollout=replace(config.rollout, batch_size=size),
        ppo=replace(config.ppo, mini_batch_size=size),
    )
    gradients: list[torch.Tensor] = []
    handle = register_optimizer_step_pre_hook(
        lambda *_: gradients.append(torch.cat(local_gradients(learner.models.parameters())))
    )
    generator = torch.Generator().manual_seed(0)
    metrics = update(
        learner, rollout, repeat(texts), one_step, generator, teacher=lambda: nullcontext(teacher)
    )
    handle.remove()
    (gradient,) = gradients
    return metrics, gradient


def test_one_process_holds_the_activations_of_one_model_at_a_time() -> None:
    config = make_config(ppo=PPOSettings(mini_batch_size=8))
    learner = make_learner(config, budget=40)
    rollout = make_rollout(learner, config)
    policy, value_model = learner.models.policy, learner.models.value_model
    norms: list[float] = []
    value_model.register_forward_pre_hook(
        lambda *_: norms.append(float(torch.cat(local_gradients(policy.parameters())).norm()))
    )
    take_step(learner, rollout, [], config)
    assert len(norms) > 1, "one row proves less"
    assert norms[0] > 0, "the value model's pass waits for the policy's backward pass"
    assert len(set(norms)) == len(norms)


def test_rewards_of_a_rollout_hold_the_score_once_and_no_kl_before_the_first_update() -> None:
    config = make_config()
    rollout = make_rollout(make_learner(config), config)
    lengths = rollout.response_mask.sum(1)
    counts = torch.tensor(
        [float(sum(token == 7 for token in tree.responses[0])) for tree in rollout.trees]
    )
    assert torch.equal(rollout.scores, counts)
    last = rollout.rewards[torch.arange(8), lengths - 1]
    assert torch.allclose(last, rollout.scores, atol=1e-6)
    assert torch.allclose(rollout.rewards.sum(1), rollout.scores, atol=1e-6)
    assert torch.equal(
        rollout.finished, torch.tensor([tree.responses[0][-1] == END for tree in rollout.trees])
    )


def test_reference_and_reward_models_come_only_for_their_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    visits: list[tuple[list[nn.Module], str, bool]] = []

    @contextmanager
    def note(models: Sequence[nn.Module], device: torch.device, offload: bool) -> Iterator[None]:
        visits.append((list(models), device.type, offload))
        yield

    monkeypatch.setattr(stages.ppo.rollout, "on_device", note)
    reward_model = tiny_scalar_of("llama")
    monkeypatch.setattr(stages.ppo.rollout, "reward_models_of", lambda reward: [reward_model])
    config = make_config(offload=True)
    make_rollout(make_learner(config), config)
    (scoring, reading) = visits
    assert scoring == ([reward_model], "cpu", True)
    assert type(reading[0][0]).__name__ == "LlamaForCausalLM" and reading[1:] == ("cpu", True)


def test_returns_come_from_advantages_before_whitening() -> None:
    config = make_config()
    learner = make_learner(config)
    whitened = make_rollout(learner, config)
    plain_settings = replace(config, ppo=replace(config.ppo, whiten_advantages=False))
    plain = make_rollout(learner, plain_settings)
    torch.testing.assert_close(whitened.returns, plain.returns, rtol=0, atol=1e-5)
    kept = whitened.advantages[whitened.response_mask]
    assert kept.mean().abs() < 1e-5
    assert abs(kept.square().mean() - 1) < 1e-4
    assert not torch.allclose(kept, plain.advantages[plain.response_mask])


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gradient_does_not_depend_on_the_micro_batch(architecture: str) -> None:
    config = make_config(ptx=PtxSettings(coef=0.7, text="unused"))
    whole = make_learner(config, 1000, architecture)
    rollout = make_rollout(whole, config)
    _, expected = take_step(whole, rollout, TEXTS, config)
    assert expected.norm() > 0.1
    num_rows = {len(whole.packer.rows(rollout.trees))}
    for budget in (40, 20, 10, 1):
        pieces = make_learner(config, budget, architecture)
        num_rows.add(len(pieces.packer.rows(rollout.trees)))
        _, found = take_step(pieces, rollout, TEXTS, config)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert len(num_rows) > 3 and min(num_rows) == 1


def test_what_comes_after_the_end_changes_no_bit_of_a_step() -> None:
    """The rollout's numbers have padding; its tokens have none, since they are packed."""
    config = make_config()
    learner = make_learner(config)
    rollout = make_rollout(learner, config)
    tensors: dict[str, Any] = {
        name: tensor
        for name, tensor in vars(rollout).items()
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32 and tensor.ndim == 2
    }
    assert len(tensors) == 6 and not rollout.response_mask.all()
    expected_metrics, expected = take_step(learner, rollout, [], config)
    for rubbish in (math.nan, math.inf, -1e30):
        dirty: dict[str, Any] = {
            k: x.where(rollout.response_mask, rubbish) for k, x in tensors.items()
        }
        other = make_learner(config)
        metrics, found = take_step(other, replace(rollout, **dirty), [], config)
        assert metrics == expected_metrics
        assert torch.equal(found, expected)


def test_the_order_of_episodes_changes_nothing() -> None:
    """Rounding may change a log-probability, value or sum by 1e-6, and a gradient by 1e-5."""
    config = make_config()
    learner, other = make_learner(config, budget=30), make_learner(config, budget=30)
    rollout = make_rollout(learner, config)
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    permuted = rollout.select(order)
    policy, value_model = learner.models.policy, learner.models.value_model
    for compute in (partial(compute_logprobs, policy), partial(compute_values, value_model)):
        rows = compute(rollout.trees, learner.packer)
        assert rows.abs().sum() > 1
        found = compute(permuted.trees, learner.packer)
        torch.testing.assert_close(found, rows[order], rtol=1e-6, atol=1e-6)
    with torch.no_grad():  # The policy has changed since the rollout, so ratios are not 1.
        for models in (learner.models, other.models):
            models.policy.lm_head.weight.mul_(1.1)
    metrics, expected = take_step(learner, rollout, [], config)
    assert metrics["ppo/clip_fraction"] > 0
    other_metrics, found = take_step(other, permuted, [], config)
    assert other_metrics == pytest.approx(metrics, rel=1e-6, abs=1e-6)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_ptx_adds_coef_times_the_gradient_of_the_mean_text_loss() -> None:
    with_text = make_config(
        ptx=PtxSettings(coef=0.7, text="unused"), optim=OptimSettings(max_grad_norm=math.inf)
    )
    without = replace(with_text, ptx=PtxSettings(coef=0.0))
    learner = make_learner(with_text)
    rollout = make_rollout(learner, with_text)
    _, both = take_step(learner, rollout, TEXTS, with_text)
    _, ppo_only = take_step(make_learner(without), rollout, [], without)

    reference = make_learner(without).models
    nats = torch.zeros(())
    for ids in ([5, 9, 13, 17, 21, 25], [30, 31, 32]):
        logits = reference.policy(input_ids=torch.tensor([ids])).logits[0, :-1]
        nats = nats + torch.nn.functional.cross_entropy(
            logits, torch.tensor(ids[1:]), reduction="sum"
        )
    (0.7 * nats / 7).backward()
    text_only = torch.cat(local_gradients(reference.parameters()))
    assert text_only.norm() > 0.1
    assert torch.allclose(both, ppo_only + text_only, atol=1e-5)


def test_a_teacher_like_the_policy_leaves_the_gradient_and_another_pulls_the_policy_to_it() -> None:
    """With ptx.targets reference the text's loss is coef * mean KL(teacher || policy)."""
    config = make_config(
        ptx=PtxSettings(coef=0.7, text="unused", targets="reference"),
        optim=OptimSettings(learning_rate=1e-3, schedule="constant", max_grad_norm=1e6),
    )
    learner = make_learner(config)
    rollout = make_rollout(learner, config)
    _, plain = take_step(learner, rollout, [], config)

    learner = make_learner(config)
    teacher = deepcopy(learner.models.policy)
    metrics, gradient = take_step(learner, rollout, TEXTS, config, teacher)
    assert metrics["ppo/ptx_loss"] == 0.0
    torch.testing.assert_close(gradient, plain, rtol=0, atol=1e-6)

    learner = make_learner(config)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05)
    expected = 0.0
    learner.models.zero_grad()
    for ids in ([5, 9, 13, 17, 21, 25], [30, 31, 32]):
        inputs = torch.tensor([ids])
        with torch.no_grad():
            taught = teacher(inputs).logits[0, :-1].log_softmax(-1)
        own = learner.models.policy(inputs).logits[0, :-1].log_softmax(-1)
        loss = (taught.exp() * (taught - own)).sum() / 7
        (0.7 * loss).backward()
        expected += loss.item()
    text = torch.cat(local_gradients(learner.models.parameters()))
    metrics, gradient = take_step(learner, rollout, TEXTS, config, teacher)
    assert metrics["ppo/ptx_loss"] == pytest.approx(expected, abs=1e-6)
    assert metrics["ppo/ptx_grad_norm"] == pytest.approx(float(text.norm()), rel=1e-5)
    torch.testing.assert_close(gradient, plain + text, rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("offload", [False, True])
def test_the_reference_teaches_where_the_settings_ask_for_it(
    offload: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[Any] = []

    @contextmanager
    def on_device(models: Sequence[nn.Module], device: Any, is_offloaded: bool) -> Iterator[None]:
        moved.append((models, is_offloaded))
        yield

    monkeypatch.setattr(stages.ppo.rollout, "on_device", on_device)
    for targets in ("text", "reference"):
        ptx = PtxSettings(coef=0.7, text="unused", targets=targets)
        config = make_config(ptx=ptx, offload=offload)
        chat = Chat(byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>"))
        worker = RolloutWorker(
            chat, tiny_policy_of("llama"), CountingReward(), Packer(1000), config
        )
        with worker.teacher() as teacher:
            assert teacher is (worker.ref_policy if targets == "reference" else None)
    assert moved == [([worker.ref_policy], offload)]


def test_gradient_norms_and_cosine_are_those_of_the_two_parts() -> None:
    config = make_config(
        ptx=PtxSettings(coef=0.7, text="unused"), optim=OptimSettings(max_grad_norm=math.inf)
    )
    learner = make_learner(config)
    rollout = make_rollout(learner, config)
    metrics, _ = take_step(learner, rollout, TEXTS, config)
    alone, _ = take_step(make_learner(config), rollout, [], config)
    ppo_norm, ptx_norm = metrics["ppo/ppo_grad_norm"], metrics["ppo/ptx_grad_norm"]
    assert ppo_norm == pytest.approx(alone["ppo/policy_grad_norm"], rel=1e-4)
    squares = ppo_norm**2 + ptx_norm**2 + 2 * metrics["ppo/grad_cosine"] * ppo_norm * ptx_norm
    assert metrics["ppo/policy_grad_norm"] == pytest.approx(squares**0.5, rel=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("num_episodes", [8, 12])
@pytest.mark.parametrize(
    "packer",
    [
        *(Packer(budget) for budget in (1, 12, 30, 1000)),
        *(Packer(1000, layout=layout) for layout in (Layout.ALONE, Layout.BLOCKS)),
    ],
)
def test_first_ratio_is_one_for_every_cut_of_the_batch(
    architecture: str, num_episodes: int, packer: Packer
) -> None:
    config = make_config(
        rollout=RolloutSettings(batch_size=num_episodes, max_new_tokens=6),
        optim=OptimSettings(learning_rate=1e-30),  # every step starts from the same weights
        value_learning_rate=1e-3,
    )
    learner = replace(make_learner(config, architecture=architecture), packer=packer)
    rollout = make_rollout(learner, config)
    order = torch.randperm(num_episodes, generator=torch.Generator().manual_seed(1))
    for mini_batch_size in (1, 2, 3, 5, num_episodes):
        batch = rollout.select(order[:mini_batch_size])
        metrics, _ = take_step(learner, batch, [], config)
        assert metrics["ppo/first_log_ratio"] < 1e-4
        assert metrics["ppo/clip_fraction"] == 0
        assert abs(metrics["ppo/approx_kl"]) < 1e-7


def test_a_ratio_of_a_gradient_norm_is_what_the_step_takes() -> None:
    with_ratio = make_config(
        ptx=PtxSettings(coef=1.0, grad_norm_ratio=3.0, text="unused"),
        optim=OptimSettings(max_grad_norm=math.inf),
    )
    learner = make_learner(with_ratio)
    rollout = make_rollout(learner, with_ratio)
    metrics, found = take_step(learner, rollout, TEXTS, with_ratio)
    ptx_norm = metrics["ppo/ptx_grad_norm"]
    assert ptx_norm == pytest.approx(3 * metrics["ppo/ppo_grad_norm"], rel=1e-5)
    # Take the same step with that coefficient as a setting.
    fixed = replace(with_ratio, ptx=PtxSettings(coef=metrics["ppo/ptx_coef"], text="unused"))
    fixed_metrics, expected = take_step(make_learner(fixed), rollout, TEXTS, fixed)
    assert metrics["ppo/ptx_coef"] > 0.01
    assert fixed_metrics["ppo/ptx_grad_norm"] == pytest.approx(ptx_norm, rel=1e-4)
    assert torch.allclose(found, expected, atol=1e-5)


def test_a_value_model_is_held_as_what_of_it_learns_asks_for() -> None:
    half = ModelSettings(path="unused", dtype="bfloat16", attention="eager")
    trusted = RewardSettings(model="rm", trust_remote_code=True)
    whole = make_config(policy=half, reward=trusted).value_settings("rm")
    assert whole == ModelSettings(path="rm", attention="eager", trust_remote_code=True)
    adapter = make_config(policy=half, reward=trusted, lora=LoraSettings(rank=4))
    assert adapter.value_settings("rm") == replace(whole, dtype="bfloat16")


def test_value_warmup_only_reads_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config()
    learner = make_learner(config)
    rollout = make_rollout(learner, config)
    logprobs = stages.ppo.learner.response_logprobs
    learns: list[bool] = []

    def noted(*row: Any) -> Tensor:
        learns.append(torch.is_grad_enabled())
        return logprobs(*row)

    monkeypatch.setattr(stages.ppo.learner, "response_logprobs", noted)
    generator = torch.Generator().manual_seed(0)
    read = update(learner, rollout, repeat([]), config, generator, only_value=True)
    assert learns == [False, False]
    assert read["ppo/ratio"] == pytest.approx(1) and read["ppo/policy_grad_norm"] == 0


def test_value_warmup_moves_the_value_model_alone_and_the_schedule_waits() -> None:
    optim = OptimSettings(learning_rate=1e-2, warmup_steps=4, weight_decay=0.1)
    ppo = PPOSettings(mini_batch_size=4, value_warmup_updates=1)
    config = make_config(num_updates=3, optim=optim, ppo=ppo)
    learner = make_learner(config)
    rollout = make_rollout(learner, config)
    models, generator = learner.models, torch.Generator().manual_seed(0)
    before = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models.children()]
    update(learner, rollout, repeat(TEXTS), config, generator, only_value=True)
    after = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models.children()]
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    rates = {group["module"]: group["lr"] for group in learner.state.optimizer.param_groups}
    assert rates[0] == pytest.approx(0.1 * 1e-2)  # the start of a warm-up
    assert rates[1] == pytest.approx((0.1 + 0.9 * 2 / 4) * config.value_learning_rate)
    update(learner, rollout, repeat([]), config, generator)
    moved = torch.cat([p.detach().flatten() for p in models.policy.parameters()])
    assert not torch.equal(before[0], moved)


def test_an_update_ends_with_the_step_that_moved_too_far() -> None:
    config = make_config(
        ppo=PPOSettings(mini_batch_size=2, num_epochs=2, max_step_kl=1e-4),
        optim=OptimSettings(learning_rate=1e-2, schedule="constant"),
    )
    learner = make_learner(config)
    rollout = make_rollout(learner, config)
    stopped = update(learner, rollout, repeat([]), config, torch.Generator().manual_seed(0))
    assert 1 < stopped["ppo/steps"] < 8  # the first step is taken before any change
    free = replace(config, ppo=replace(config.ppo, max_step_kl=None))
    metrics = update(
        make_learner(free), rollout, repeat([]), free, torch.Generator().manual_seed(0)
    )
    assert metrics["ppo/steps"] == 8


def test_moving_average_trails_the_policy() -> None:
    config = make_config(ema_decay=0.5)
    learner = make_learner(config)
    weight = learner.models.policy.lm_head.weight
    before = weight.detach().clone()
    take_step(learner, make_rollout(learner, config), [], config)
    assert learner.state.average is not None
    average = learner.state.average.average["lm_head.weight"]
    assert not torch.equal(before, weight)
    assert torch.allclose(average, (before + weight) / 2, atol=1e-7)


def test_text_is_joined_behind_its_separator_and_cut_to_full_blocks() -> None:
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", bos_token="<s>")
    chat = Chat(tokenizer)
    config = make_config(ptx=PtxSettings(coef=1.0, text="t.jsonl", block_tokens=4))
    trees = text_blocks(["abc", "de", "f"], chat, config)
    a, b, c, d, e = (tokenizer(letter).input_ids[0] for letter in "abcde")
    blocks = [tree.prompt + tree.responses[0] for tree in trees]
    assert blocks == [(0, a, b, c), (0, d, e, 0)]
    with pytest.raises(ValueError, match=r"t\.jsonl holds 2 tokens, less than one block"):
        text_blocks(["a"], chat, config)


def test_a_document_begins_with_the_special_token_that_is_named() -> None:
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", bos_token="<s>")
    chat = Chat(tokenizer)
    ptx = PtxSettings(coef=1.0, text="t.jsonl", block_tokens=3, document_start="</s>")
    (tree,) = text_blocks(["ab"], chat, make_config(ptx=ptx))
    a, b = (tokenizer(letter).input_ids[0] for letter in "ab")
    assert tree.prompt + tree.responses[0] == (1, a, b)
    wrong = make_config(ptx=replace(ptx, document_start="<|end|>"))
    with pytest.raises(ValueError, match=r"ptx\.document_start: '<\|end\|>' is no special token"):
        text_blocks(["ab"], chat, wrong)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"ppo": PPOSettings(mini_batch_size=0)}, "mini_batch_size is 0"),
        (
            lambda: {"ppo": PPOSettings(mini_batch_size=3)},
            "size is 3.*batch_size 8.*nearest",
        ),
        (lambda: {"ptx": PtxSettings(coef=1.0)}, "ptx.coef is 1.0 but ptx.text is not given"),
        (lambda: {"ptx": PtxSettings(coef=-1.0)}, "coef is -1.0; give a number: 0 or more"),
        (lambda: {"ptx": PtxSettings(coef=1.0, text="t", block_tokens=1)}, "block_tokens is 1"),
        (lambda: {"ptx": PtxSettings(coef=0.0, blocks_per_episode=0.0)}, "blocks_per_episode is 0"),
        (lambda: {"num_eval_prompts": 0}, "num_eval_prompts is 0"),
        (
            lambda: {"ppo": PPOSettings(mini_batch_size=4, value_clip_range=-0.2)},
            "clip_range is -0",
        ),
        (lambda: {"ppo": PPOSettings(mini_batch_size=4, gae_lambda=1.5)}, "gae_lambda is 1.5"),
        (lambda: {"ppo": PPOSettings(mini_batch_size=4, gamma=-0.1)}, "gamma is -0.1"),
        (lambda: {"ema_decay": 1.0}, "ema_decay is 1.0"),
        (lambda: {"ppo": PPOSettings(mini_batch_size=4, kl_coef=-0.1)}, "kl_coef is -0.1"),
        (lambda: {"num_updates": 0}, "num_updates is 0"),
        (
            lambda: {"ppo": PPOSettings(mini_batch_size=4, value_warmup_updates=2)},
            "value_warmup_updates is 2 of num_updates 2",
        ),
        (
            lambda: {"ppo": PPOSettings(mini_batch_size=4, kl_target=6.0, kl_coef=0.0)},
            "kl_target is 6.0 but ppo.kl_coef is 0",
        ),
        (lambda: {"ppo": PPOSettings(mini_batch_size=4, max_step_kl=0.0)}, "max_step_kl is 0"),
        (lambda: {"ptx": PtxSettings(coef=0.0, grad_norm_ratio=-1.0)}, "grad_norm_ratio is -1"),
        (
            lambda: {
                "generation": GenerationSettings(engine="vllm"),
                "lora": LoraSettings(rank=4, quantize="4bit"),
            },
            "engine is vllm and lora.quantize is 4bit",
        ),
        (
            lambda: {"offload": True, "lora": LoraSettings(rank=4)},
            "offload is True and lora.rank",
        ),
    ],
)
def test_contradictory_settings_are_refused_with_their_values(
    changes: Callable[[], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(**changes())


def test_a_run_learns_and_its_folder_loads(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    Chat(tokenizer)
    policy = tiny_policy_of("llama", vocab_size=len(tokenizer))
    with torch.no_grad():
        policy.lm_head.weight.mul_(0.1)  # The policy starts unsure of everything.
    save_policy(policy, tokenizer, tmp_path / "sft")
    prompts = [{"prompt": f"say {number}"} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "the cat sat. " * 40}) + "\n")
    config = make_config(
        output_dir=str(tmp_path / "ppo"),
        policy=ModelSettings(path=str(tmp_path / "sft")),
        prompts=str(tmp_path / "prompts.jsonl"),
        prompts_held_out=str(tmp_path / "prompts.jsonl"),
        reward=RewardSettings(function="tests.stages.test_ppo:share_of_e", missing_end="none"),
        rollout=RolloutSettings(batch_size=32, max_new_tokens=6),
        ppo=PPOSettings(mini_batch_size=8, kl_coef=0.02),
        ptx=PtxSettings(
            coef=0.1, text=str(tmp_path / "text.jsonl"), block_tokens=16, blocks_per_episode=0.25
        ),
        optim=OptimSettings(learning_rate=5e-3, schedule="constant"),
        value_learning_rate=5e-3,
        num_updates=12,
        eval_every=6,
        ema_decay=0.8,
    )
    train(config)
    rows = [json.loads(line) for line in (tmp_path / "ppo/metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(12))
    assert abs(rows[0]["ppo/kl"]) < 1e-3
    first, last = (sum(row["ppo/score"] for row in part) for part in (rows[:3], rows[-3:]))
    assert last > 3 * first
    assert rows[-1]["ppo/ptx_loss"] < rows[0]["ppo/ptx_loss"]
    phases = [{k: v for k, v in row.items() if k.startswith("seconds/")} for row in rows]
    assert set(phases[0]) == {f"seconds/{name}" for name in PHASES}
    assert phases[10]["seconds/save"] > 0  # the checkpoint after ten updates
    samples = [json.loads(line) for line in (tmp_path / "ppo/samples.jsonl").open()]
    assert {row["step"] for row in samples} == {0, 6, 11}
    results = json.loads((tmp_path / "ppo/results.json").read_text())
    assert results["held_out_score"] > 3 * rows[0]["ppo/held_out_score"]
    saved, report = load_with_report(AutoModelForCausalLM, tmp_path / "ppo")
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not torch.equal(saved.lm_head.weight, policy.lm_head.weight)


def test_the_kl_coefficient_steers_itself_once_the_policy_learns(ppo_config: Config) -> None:
    """A KL far below its target lowers the coefficient by 20 % of episodes / horizon an update."""
    ppo = replace(ppo_config.ppo, kl_target=50.0, kl_horizon=320, value_warmup_updates=1)
    train(replace(ppo_config, ppo=ppo))
    rows = [json.loads(line) for line in (Path(ppo_config.output_dir) / "metrics.jsonl").open()]
    factor = 1 - 0.2 * 32 / 320
    expected = [0.02, 0.02, 0.02 * factor, 0.02 * factor**2]
    assert [row["ppo/kl_coef"] for row in rows] == pytest.approx(expected, rel=1e-9)
    assert abs(rows[1]["ppo/kl"]) < 1e-6 < abs(rows[3]["ppo/kl"])


def test_a_seed_gives_the_same_run_bit_for_bit_and_another_seed_another(
    ppo_config: Config, ppo_inputs: Path
) -> None:
    text = ppo_inputs / "text.jsonl"
    text.write_text(json.dumps({"text": "the cat sat. " * 40}) + "\n")
    ptx = PtxSettings(coef=0.1, text=str(text), block_tokens=16, blocks_per_episode=0.25)
    runs = {}
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        folder = Path(ppo_config.output_dir) / name
        train(replace(ppo_config, ptx=ptx, ema_decay=0.9, seed=seed, output_dir=str(folder)))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        rows = [{k: v for k, v in json.loads(line).items() if not is_timing(k)} for line in lines]
        runs[name] = rows, (folder / "model.safetensors").read_bytes()
    assert runs["first"] == runs["again"]
    assert len(runs["first"][0]) == ppo_config.num_updates
    assert runs["first"][0][-1]["ppo/kl"] != runs["other"][0][-1]["ppo/kl"]


def test_phases_of_the_first_update_hold_nothing_from_before_it(ppo_config: Config) -> None:
    reward = replace(ppo_config.reward, normalize_on=1024)  # many more samples than in an update
    train(replace(ppo_config, reward=reward, num_updates=1))
    (row,) = map(json.loads, (Path(ppo_config.output_dir) / "metrics.jsonl").open())
    phases = {name: value for name, value in row.items() if name.startswith("seconds/")}
    assert sum(phases.values()) <= 2 * phases["seconds/update"]  # the update is one of them


def test_phases_hold_all_passes_of_an_update(
    ppo_config: Config, ppo_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock shows the number of module calls, so seconds outside all phases would be calls that
    no phase counts. Each reading adds a millionth, as some code divides by what passed."""
    num_calls = 0.0

    def add_call(*_: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    def read_clock() -> float:
        nonlocal num_calls
        num_calls += 1e-6
        return num_calls

    clock = SimpleNamespace(perf_counter=read_clock)
    monkeypatch.setattr(rlhf.runs.stopwatch, "time", clock)
    monkeypatch.setattr(stages.ppo.train, "time", clock)
    text = ppo_inputs / "cat.jsonl"
    text.write_text(json.dumps({"text": "the cat sat. " * 40}) + "\n")
    ptx = PtxSettings(coef=0.1, text=str(text), block_tokens=16, blocks_per_episode=0.25)
    config = replace(
        ppo_config, ptx=ptx, prompts_held_out=ppo_config.prompts, eval_every=1, num_updates=2
    )
    with nn.modules.module.register_module_forward_hook(add_call):
        train(config)
    for row in map(json.loads, (Path(config.output_dir) / "metrics.jsonl").open()):
        phases = {k.removeprefix("seconds/"): v for k, v in row.items() if "seconds/" in k}
        whole = phases.pop("update")
        assert sum(phases.values()) == pytest.approx(whole, abs=1e-3)
        with_passes = {name for name, calls in phases.items() if calls >= 1}
        assert with_passes == set("rollout logprobs reference value ptx train evaluate".split())


def test_gradient_checkpointing_changes_no_result(
    ppo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the 4 updates has 2 steps of one row, whose 2 layers run once more in each model."""
    num_calls = 0
    forward = LlamaMLP.forward

    def count(*args: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return forward(*args)

    monkeypatch.setattr(LlamaMLP, "forward", count)
    runs = {}
    for checkpointing in (False, True):
        num_calls = 0
        folder = Path(ppo_config.output_dir) / str(checkpointing)
        train(replace(ppo_config, gradient_checkpointing=checkpointing, output_dir=str(folder)))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        runs[checkpointing] = [row["ppo/value_loss"] for row in rows], num_calls
    assert runs[True][0] == pytest.approx(runs[False][0], rel=1e-4)
    assert runs[True][1] == runs[False][1] + 4 * 2 * 2 * 2


@pytest.fixture
def bf16_launch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Set what `accelerate launch --mixed_precision bf16` sets."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("bf16_launch")
def test_mixed_precision_holds_in_every_pass_of_a_run(
    ppo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds in sampling, in passes without gradient, in training and on held-out prompts.

    The reference is computed as the policy is, so that the KL is 0 before the first step.
    """
    types: set[torch.dtype] = set()
    forward = LlamaMLP.forward

    def note(*args: Any) -> Tensor:
        output = forward(*args)
        types.add(output.dtype)
        return output

    def load(*args: Any) -> Any:
        models = load_models(*args)
        types.clear()  # A probe found how the models can be packed.
        return models

    load_models = stages.ppo.setup.load_models
    monkeypatch.setattr(stages.ppo.setup, "load_models", load)
    # The probe for sampling compares in full precision.
    monkeypatch.setattr("rlhf.generation.decoder._equals_plain_passes", lambda policy, way: True)
    monkeypatch.setattr(LlamaMLP, "forward", note)
    train(replace(ppo_config, prompts_held_out=ppo_config.prompts, eval_every=1))
    assert types == {torch.bfloat16}
    folder = Path(ppo_config.output_dir)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert rows[0]["ppo/reference_difference_high"] == 0.0 < rows[-1]["ppo/held_out_kl"]
    assert rows[0]["ppo/sampler_difference"] < 0.5
    assert all(row["ppo/first_log_ratio"] < 0.5 for row in rows)


def test_half_types_whose_gradients_are_scaled_are_refused(
    ppo_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    launched = SimpleNamespace(mixed_precision="fp16", num_processes=1, device=cpu)
    monkeypatch.setattr(stages.ppo.setup, "start_accelerator", lambda: launched)
    message = "^mixed_precision of the launcher is fp16, .* bf16 or no"
    with pytest.raises(ValueError, match=message):
        train(ppo_config)
    with pytest.raises(ValueError, match=message):
        make_plan(ppo_config, Launch(mixed_precision="fp16"))


def test_a_variable_hides_the_bar_so_that_two_runs_can_share_a_terminal(
    ppo_config: Config, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    config = replace(ppo_config, num_updates=1, force=True)
    train(config)
    assert "1/1 [" in capfd.readouterr().err
    monkeypatch.setenv("TQDM_DISABLE", "1")
    train(config)
    assert "1/1 [" not in capfd.readouterr().err


def test_the_end_is_told_in_a_line() -> None:
    trained = {"ppo/score": 1.5, "ppo/kl": 2.25, "ppo/response_tokens": 30.0}
    held_out = {"score": 1.0, "kl": 3.5, "tokens": 8.5}
    assert last_line(trained, [], 24) == (
        "after 24 updates score 1.50, KL 2.25 nats and 30.0 tokens a response; alarms: none"
    )
    both = trained | {f"ppo/held_out_{name}": value for name, value in held_out.items()}
    assert last_line(both, {"PPO_KL": {}, "PPO_LENGTH": {}}, 3) == (
        "after 3 updates held-out score 1.00, KL 3.50 nats and 8.5 tokens a response; alarms: "
        "PPO_KL, PPO_LENGTH"
    )
