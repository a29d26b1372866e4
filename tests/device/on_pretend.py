"""Runs every stage on the pretend device; test_pretend.py runs this file in its own process.

A budget says how often the host may wait for the device. Each wait lets a GPU run dry, since the
host then queues nothing. A budget may only grow with a reason beside it.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState

from rlhf.generation.decoder import decoding_mode_for
from rlhf.generation.hf import LoopEngine
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.packing import PackedRow, Packer, PromptTree, idle_row
from rlhf.models import layout
from rlhf.models.architectures import check_causal
from rlhf.models.layout import packer_for
from rlhf.models.passes import compute_scores
from rlhf.models.settings import ModelSettings
from rlhf.rewards.models import load_reward_model
from rlhf.training import step as step_module
from rlhf.training.numbers import to_floats
from rlhf.training.processes import start_accelerator
from stages.evaluate.evaluate import evaluate
from stages.ppo import speed
from stages.ppo.config import PPOSettings
from stages.ppo.train import train as train_ppo
from stages.pretrain.train import pretrain
from stages.rm.train import train as train_rm
from stages.sft.train import train as train_sft
from stages.sft.trainer import _is_fused_right
from tests.device import pretend
from tests.distributed.chain import make_inputs, ppo_settings, rm_settings, sft_settings
from tests.distributed.other_stages import evaluate_settings, pretrain_settings
from tests.rlhf.tiny_models import tiny_policy_of, tiny_scalar_of

pretend.register()

DEVICE = torch.device(pretend.NAME)
TOLERANCE = 1e-4
"""The device computes a dense mask where the CPU computes segments, which rounds differently."""


@dataclass
class Seen:
    """Holds what was seen of a stage on the device."""

    waits: pretend.Waits
    rows: list[PackedRow]
    """The rows of all training passes."""
    probes: list[tuple[str, bool]]
    """The model's device in each test pass of packing, and whether autocast was on."""
    warned: list[str]


@contextmanager
def watched(precision: str) -> Iterator[Seen]:
    """Run what is inside on the device, under a launcher that says this mixed_precision."""
    seen = Seen(pretend.Waits(), [], [], [])
    equal_rows, refusal = step_module.equal_rows, layout._refusal

    def note_rows(accelerator: Any, rows: list[PackedRow]) -> list[PackedRow]:
        seen.rows += rows
        return equal_rows(accelerator, rows)

    def note_probe(model: Any, packer: Packer) -> str:
        device = next(model.parameters()).device.type
        seen.probes.append((device, torch.is_autocast_enabled(device)))
        return refusal(model, packer)

    AcceleratorState._reset_state(reset_partial_state=True)
    with (
        mock.patch.dict(os.environ, {"ACCELERATE_MIXED_PRECISION": precision}),
        mock.patch.object(step_module, "equal_rows", note_rows),
        mock.patch.object(layout, "_refusal", note_probe),
        # It would multiply matrices of 8192 x 8192, as on a real accelerator.
        mock.patch.object(speed, "matrix_rate", lambda *_: 1e12),
        warnings.catch_warnings(record=True) as warned,
        pretend.at_work() as seen.waits,
    ):
        warnings.simplefilter("always")
        yield seen
    seen.warned = [str(one.message) for one in warned]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretend")
    make_inputs(folder, num_rows=8)
    return folder


@pytest.fixture(scope="module")
def sft(inputs: Path) -> Seen:
    with watched("no") as seen:
        train_sft(sft_settings(inputs, inputs / "sft", num_samples=2))
    return seen


@pytest.fixture(scope="module")
def rm(inputs: Path, sft: Seen) -> Seen:
    with watched("bf16") as seen:
        train_rm(rm_settings(inputs, inputs / "sft", inputs / "rm", num_epochs=1, batch_size=4))
    return seen


@pytest.fixture(scope="module")
def ppo(inputs: Path, rm: Seen) -> Seen:
    with watched("bf16") as seen:
        train_ppo(
            ppo_settings(
                inputs,
                inputs / "sft",
                inputs / "rm",
                inputs / "ppo",
                num_updates=NUM_UPDATES,
                num_eval_prompts=2,
                micro_batch_tokens=64,  # room for two episodes, or three blocks of text
                ppo=PPOSettings(mini_batch_size=4),
            )
        )
    return seen


NUM_UPDATES = 1
NUM_STEPS = NUM_UPDATES * 2
"""PPO takes eight episodes an update, and four a step."""


def within(budget: int, waits: list[pretend.Wait]) -> None:
    assert len(waits) <= budget, f"{len(waits)} waits, {budget} allowed:\n{pretend.lines(waits)}"


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


# ---- The stages


def test_sft_rm_and_ppo_with_ptx_run_and_their_folders_are_whole(
    inputs: Path, sft: Seen, rm: Seen, ppo: Seen
) -> None:
    for name, seen in (("sft", sft), ("rm", rm), ("ppo", ppo)):
        assert results(inputs / name)
        copied = [one.operation for one in seen.waits.within("rlhf/models/saving.py")]
        assert "a copy to the CPU" in copied, "the model that was saved was not on the device"
    metrics = json.loads((inputs / "ppo/metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["ppo/ptx_loss"] > 0 and metrics["ppo/grad_cosine"] != 0


def test_pretrain_runs(inputs: Path) -> None:
    with watched("no") as seen:
        pretrain(pretrain_settings(inputs, inputs / "pretrain"))
    assert results(inputs / "pretrain")["held_out_loss"] > 0
    waits = seen.waits.within("stages/pretrain/train.py:_train")
    # Its one step reads the norm, which must be finite, and the loss. The evaluation reads a loss.
    # transformers asks in both passes whether positions start anew.
    within(3 + 2, [one for one in waits if not one.is_within("rlhf/training/sharding.py:prepare")])
    assert any("mixed_precision" in text for text in seen.warned)


def test_evaluate_runs(inputs: Path) -> None:
    with watched("no") as seen:
        evaluate(evaluate_settings(inputs, inputs / "evaluate"))
    assert (inputs / "evaluate/results.json").exists()
    assert {device for device, _ in seen.probes} == {pretend.NAME}


def test_the_reward_model_is_that_of_a_cpu(inputs: Path, rm: Seen) -> None:
    """The device reads a dense mask over whole trees, the CPU their segments."""
    AcceleratorState._reset_state(reset_partial_state=True)
    on_cpu = rm_settings(inputs, inputs / "sft", inputs / "rm_cpu", num_epochs=1, batch_size=4)
    with mock.patch.object(torch.accelerator, "is_available", lambda: False):
        train_rm(on_cpu)
    ours, theirs = results(inputs / "rm"), results(inputs / "rm_cpu")
    for name in ("first_loss", "log_loss", "bias"):
        assert ours[name] == pytest.approx(theirs[name], abs=TOLERANCE), name


def test_packing_is_tried_on_the_device_in_the_precision_of_the_run(
    sft: Seen, rm: Seen, ppo: Seen
) -> None:
    there = pretend.NAME
    assert sft.probes == [(there, False)]
    # The trained model; the saved one, which is measured in float32, twice.
    assert rm.probes == [(there, True), (there, False), (there, False)]
    # The reward model, policy and value model.
    assert ppo.probes == [(there, True)] * 3
    assert all(row.segments is None for row in rm.rows + ppo.rows), "only a CPU reads segments"


def test_a_model_that_waits_in_cpu_memory_is_tried_on_the_device(inputs: Path, rm: Seen) -> None:
    settings = ModelSettings(path=str(inputs / "rm"))
    with watched("no") as seen:
        reward = load_reward_model(
            settings,
            micro_batch_tokens=64,
            device=DEVICE,
            allow_chance_reward=True,
            offload=True,
        )
    assert seen.probes == [(pretend.NAME, False)]
    assert next(reward.model.parameters()).device.type == "cpu"


def test_a_launcher_without_mixed_precision_is_warned_of(sft: Seen, rm: Seen, ppo: Seen) -> None:
    assert [text for text in sft.warned if "configs/accelerate/gpu.yaml" in text]
    assert not [text for text in rm.warned + ppo.warned if "mixed_precision" in text]


# ---- How often the host waits


def test_decoding_waits_twice_a_token() -> None:
    """It waits once for tokens and log-probabilities, because Python decides which rows have ended.

    It waits once more in transformers, which asks whether the mask hides anything.
    """
    policy = tiny_policy_of("llama")
    counts = []
    for num_tokens in (4, 12):
        engine = LoopEngine(GenerationSettings())
        with pretend.at_work() as waits:
            engine.refresh(policy.to(DEVICE))
            how = Decoding(end_id=-1, max_new_tokens=num_tokens, temperature=1.0)
            samples = engine.generate([[5, 6, 7], [8, 9]], how, torch.Generator().manual_seed(0))
        assert [len(one) for one in samples.responses] == [num_tokens] * 2
        counts.append(len(waits.within("rlhf/generation/hf.py:_generate_batch")))
    assert counts[1] - counts[0] == 2 * (12 - 4), pretend.lines(waits.found)


def test_a_pass_of_scores_waits_once_however_many_rows_it_has() -> None:
    model = tiny_scalar_of("llama")
    trees = [PromptTree((5, 6, 7 + i), ((8, 9), (10, 11, 12))) for i in range(6)]
    with pretend.at_work() as waits:
        model.to(DEVICE)
        packer = packer_for(model.classifier, 8)
        assert len(packer.rows(trees)) == 6
        before = len(waits.found)
        compute_scores(model, trees, packer)
    within(1, waits.found[before:])


def test_rm_training_waits_twice_a_step_and_never_for_a_row(rm: Seen) -> None:
    """It waits for the sums of the metrics, and for the norm of the gradient.

    Both must be finite before the step is taken.
    """
    num_steps = 2
    assert len(rm.rows) >= 2 * num_steps and not any(row.plain for row in rm.rows)
    within(2 * num_steps, rm.waits.within("stages/rm/update.py:update"))


def test_ppo_training_waits_for_a_step_and_never_for_a_row(ppo: Seen) -> None:
    waits = ppo.waits.within("stages/ppo/update.py:update")
    # A row of one tree has no mask, so transformers asks whether its positions start anew: once in
    # the policy, and once in the value model, which reads no text.
    of_plain_rows = [one for one in waits if "hidden_states" in one.path[-1]]
    num_plain = sum(row.plain for row in ppo.rows)
    assert len(ppo.rows) - num_plain > NUM_STEPS, "rows of several trees are missing"
    within(2 * num_plain, of_plain_rows)
    # The clock stops at both ends of the phases ptx, train and step, so that their seconds add up.
    clock = [one for one in waits if one.operation == "synchronize"]
    within(6 * NUM_STEPS, clock)
    # A step reads the two gradients' products, the norms, which must be finite, and the sums of the
    # metrics, which decide whether the update ends here. The first step of an update also compares
    # its ratios, as a mean and as what one token in a thousand exceeds.
    rest = [one for one in waits if one not in of_plain_rows and one not in clock]
    within(3 * NUM_STEPS + 2 * NUM_UPDATES, rest)


def test_no_backward_pass_waits(sft: Seen, rm: Seen, ppo: Seen) -> None:
    """It runs in a thread of torch, in which none of our lines runs."""
    for seen in (sft, rm, ppo):
        within(0, [one for one in seen.waits.found if not one.path])


def test_a_rollout_waits_for_tokens_and_once_for_each_models_pass(ppo: Seen) -> None:
    waits = ppo.waits.within("stages/ppo/rollout.py:roll_out")
    passes = [one for one in waits if "rlhf/models/passes.py:_to_cpu" in one.path[-1]]
    # Scores, reference, values, and the policy's log-probabilities, entropies and variances.
    within(6 * NUM_UPDATES, passes)


def test_sft_training_waits_in_trl_only(sft: Seen) -> None:
    num_steps, num_passes = 2, 4
    waits = [
        one
        for one in sft.waits.within("stages/sft/trainer.py:fit")
        if not one.is_within("stages/sft/trainer.py:make_trainer")
        and not one.is_within("stages/sft/trainer.py:_measure_and_log")
        and not one.is_within("rlhf/models/saving.py")
    ]
    # TRL reads the accuracy, the entropy and the number of tokens of each pass; transformers asks
    # whether the mask hides anything. Some of it is read twice.
    in_a_pass = [one for one in waits if one.is_within("stages/sft/trainer.py:compute_loss")]
    within(7 * num_passes, in_a_pass)
    # The Trainer copies each pass's ids, mask and labels, and reads as many numbers.
    within(6 * num_passes + 1 * num_steps, [one for one in waits if one not in in_a_pass])


# ---- The device's own rules


@pytest.mark.parametrize(
    "compute",
    [
        lambda there, here: there + here,
        lambda there, here: there @ here.T,
        lambda there, here: torch.cat([there, here]),
        lambda there, here: there.where(here > 0, 0.0),
        lambda there, here: there.masked_fill(here > 0, 0.0),
        lambda there, here: there.add_(here),
        lambda there, here: here[there.long()],
        lambda there, here: torch.nn.functional.linear(there, here),
        lambda there, here: torch.rand(2, generator=torch.Generator(), device=DEVICE),
        lambda there, here: torch.rand(2, generator=torch.Generator(DEVICE)),
        lambda there, here: there.numpy(),
    ],
)
def test_operands_on_two_devices_are_refused(compute: Callable[..., Any]) -> None:
    with pretend.at_work():
        here, there = torch.ones(2, 2), torch.ones(2, 2, device=DEVICE)
        with pytest.raises((pretend.DeviceMismatch, TypeError), match=r"device|convert"):
            compute(there, here)


@pytest.mark.parametrize(
    ("compute", "num_waits"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x.sum()), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu(), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.masked_select(x > 0), 1),
        (lambda x: x[torch.tensor([0, 1])], 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: torch.ones(2).to(DEVICE), 1),
        (lambda x: torch.tensor([1.0], device=DEVICE), 1),
        (lambda x: x.copy_(torch.ones(2, 2)), 1),
        (lambda x: torch.ones(2).to(DEVICE, non_blocking=True), 0),
        (lambda x: x[x.long() * 0], 0),
        (lambda x: x.masked_fill_(x > 0, 2.0), 0),
        (lambda x: x.where(x > 0, 1.0) * torch.tensor(2.0), 0),
        (lambda x: (x @ x).softmax(-1).argmax(-1), 0),
        (lambda x: to_floats([x.sum(), x.max(), 1.0]), 1),
    ],
)
def test_waits_are_counted(compute: Callable[..., Any], num_waits: int) -> None:
    with pretend.at_work() as waits:
        x = torch.ones(2, 2, device=DEVICE)
        compute(x)
    assert len(waits.found) == num_waits, waits.found


def test_an_index_put_under_a_mask_waits_only_for_several_values() -> None:
    with pretend.at_work() as waits:
        x = torch.zeros(3, device=DEVICE)
        x[x == 0] = 1.0
        assert not waits.found
        x[x == 1] = x + 1
    assert [one.operation for one in waits.found] == ["a mask as an index"]
    assert isinstance(x, pretend.DeviceTensor)
    assert x.host.tolist() == [2.0, 2.0, 2.0]


def test_a_wait_names_our_line() -> None:
    with pretend.at_work() as waits:
        idle_row().to(DEVICE)
    assert waits.found and all("rlhf/inputs/packing.py" in one.path[-1] for one in waits.found)
    assert "rlhf/inputs/packing.py" in pretend.lines(waits.found)


def test_the_packing_probe_takes_no_wrong_device_for_a_refusal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a mask left on the CPU, every response would go through the model alone."""
    mask = vars(PackedRow)["attention_mask"].func
    on_cpu = property(lambda row: None if row.plain else mask(row).cpu())
    monkeypatch.setattr(PackedRow, "attention_mask", on_cpu)
    with pretend.at_work(), pytest.raises(pretend.DeviceMismatch):
        packer_for(tiny_policy_of("llama").to(DEVICE), 64)


@pytest.mark.parametrize(
    ("try_out", "argument"),
    [
        (decoding_mode_for, "past_key_values"),
        (_is_fused_right, "fused_lm_head"),
        (lambda policy: check_causal(policy, "folder"), "input_ids"),
    ],
)
def test_no_other_trial_takes_a_wrong_device_for_a_refusal(
    try_out: Callable[..., Any], argument: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise sampling would use no cache, SFT no fused head, and a model would seem faulty."""
    policy = tiny_policy_of("llama")
    forward = policy.forward

    def with_a_tensor_on_the_cpu(**inputs: Any) -> Any:
        if inputs.get(argument) is not None:
            inputs["input_ids"] = inputs["input_ids"].cpu()
        return forward(**inputs)

    monkeypatch.setattr(policy, "forward", with_a_tensor_on_the_cpu)
    with pretend.at_work(), pytest.raises(pretend.DeviceMismatch):
        try_out(policy.to(DEVICE))


def test_gradients_are_those_of_the_cpu() -> None:
    found = []
    for device in (torch.device("cpu"), DEVICE):
        policy = tiny_policy_of("llama")
        with pretend.at_work():
            policy.to(device)
            (row,) = Packer(64).rows([PromptTree((5, 6), ((7, 8), (9, 10, 11)))])
            row = row.to(device)
            policy(**row.model_inputs).logits.square().mean().backward()
            found.append({name: one.grad.cpu() for name, one in policy.named_parameters()})
    torch.testing.assert_close(found[1], found[0], atol=1e-6, rtol=1e-5)


def test_the_accelerator_is_the_device() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    with pretend.at_work():
        assert start_accelerator().device.type == pretend.NAME
