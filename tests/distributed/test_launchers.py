"""Two processes, and ZeRO-2 and ZeRO-3 on top, do what one process does: gradients of one global
batch, and SFT, a reward model and PPO with ptx one after another."""

import importlib.util
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.models.settings import ModelSettings
from rlhf.rewards.models import load_reward_model
from rlhf.training.processes import check_plugin, naming
from stages.evaluate.evaluate import evaluate
from stages.ppo.config import PtxSettings
from stages.pretrain.train import pretrain
from stages.rm.train import train as train_reward_model
from stages.sft.train import train as fine_tune
from tests.distributed.chain import LORA, make_inputs, rm_settings, sft_settings
from tests.distributed.gpu_files import WITH_ADAPTERS, Part, all_parts
from tests.distributed.gradients import Step, all_steps, ppo_step
from tests.distributed.launching import (
    FILES_FOR_GPUS,
    ONE_GPU,
    TWO_NODES,
    Launched,
)
from tests.distributed.one_copy import SETTINGS
from tests.distributed.other_stages import (
    NUM_PROMPTS,
    NUM_RESPONSES,
    evaluate_settings,
    pretrain_settings,
)
from tests.distributed.rollouts import greedy_rollouts
from tests.distributed.row_counts import FEW, MORE, make_rows, rm_of, sft_of
from tests.distributed.streamed import KINDS
from tests.rlhf.plain_loading import load_with_report
from tests.rlhf.tiny_models import tiny_policy_of

LONG = "cpu2_zero2"
"""Splits less than ZeRO-3 does, and takes as long."""
OFFLOADED = "deepspeed_zero3_offload"
"""All stages under it are as under ZeRO-3, and are a long test. Its gradients were once wrong."""


def in_float32(*names: str, long: Collection[str]) -> list[Any]:
    """Return the launches that try something in float32, with the mark of those that are long."""
    return [pytest.param(name, marks=[pytest.mark.long] if name in long else []) for name in names]


ON_CPU = in_float32(*FILES_FOR_GPUS, long=[LONG])
ON_CPU_LONG_WITH_ZERO = in_float32(*FILES_FOR_GPUS, long=[LONG, "cpu2_zero3"])
"""For what depends little on the launcher, and takes long under ZeRO-3."""


def files_for_gpus(*long: str) -> list[Any]:
    """Pair each file for GPUs with the launch that tries it.

    Args:
        long: Files and launches whose tests are long, beside those of two nodes.
    """
    pairs = [(cpu, name) for cpu, names in FILES_FOR_GPUS.items() for name in names]
    pairs += [(ONE_GPU, ONE_GPU), *((name, name) for name in TWO_NODES)]
    long_ones = {*long, *TWO_NODES}
    return [
        pytest.param(*pair, marks=[pytest.mark.long] if long_ones.intersection(pair) else [])
        for pair in pairs
    ]


FOR_GPUS = files_for_gpus(LONG, OFFLOADED, "multi_gpu")
"""Under multi_gpu the stages are as under `cpu2`, in the type that they have under `gpu`."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    make_rows(folder)
    return folder


@pytest.fixture(scope="module")
def launched(
    request: pytest.FixtureRequest, inputs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Launched:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed, an extra, is not installed")
    return Launched(inputs, tmp_path_factory, parts_asked_for(request.session.items))


def parts_asked_for(tests: Sequence[pytest.Item]) -> dict[str, set[Part]]:
    """Map each launcher file to what the selected tests need of it (their mark `parts`)."""
    asked: dict[str, set[Part]] = {}
    for test in tests:
        mark = test.get_closest_marker("parts")
        if mark is None or not isinstance(test, pytest.Function):
            continue
        name = str(test.callspec.params["name"])
        if name in FILES_FOR_GPUS:
            asked.setdefault(name, set()).update(mark.args)
            if "adapters" in mark.args:  # ZeRO's are compared with those of plain data parallelism
                asked.setdefault("cpu2", set()).add("adapters")
        else:
            for file in {name, on_one_node(name)}:
                asked.setdefault(file, set()).update(all_parts(file).intersection(mark.args))
    return asked


@pytest.fixture(scope="module")
def of_one_process(tmp_path_factory: pytest.TempPathFactory) -> Step:
    return all_steps(tmp_path_factory.mktemp("gradients"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_gradients_of_a_global_batch(name: str, launched: Launched, of_one_process: Step) -> None:
    found = load_file(launched[name] / "gradients.safetensors")
    seen = read(launched[name] / "seen.json")
    assert seen["processes"] == 2
    if name == "cpu2_zero3":  # DeepSpeed 0.19.0 still holds what its first and last modules read
        assert [weight for weight in seen["whole"] if ".layers." in weight] == []
    else:
        assert seen["whole"] == of_one_process.whole
    expected = of_one_process.gradients
    assert found.keys() == expected.keys()
    for loss in ("ppo", "ratio", "taught", "recomputed", "rm", "sft"):
        own = {k: value for k, value in expected.items() if k.startswith(f"{loss}/")}
        assert max(float(value.abs().max()) for value in own.values()) > 0.01
        assert largest_difference(found, own) < 1e-5, loss


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_weights_are_those_of_one_process(
    name: str, inputs: Path, launched: Launched, tmp_path: Path
) -> None:
    """Of SFT and the reward model; PPO samples by other generators on two processes, so ZeRO's
    policy is compared with that of plain data parallelism."""
    fine_tune(sft_settings(inputs, tmp_path / "sft"))
    base = load_file(inputs / "base" / "model.safetensors")
    sft, rm, ppo = (launched[name] / stage for stage in ("sft", "rm", "ppo"))
    assert largest_difference(weights(sft), weights(tmp_path / "sft")) < 1e-5
    assert largest_difference(weights(sft), base) > 1e-3
    train_reward_model(rm_settings(inputs, sft, tmp_path / "rm"))
    assert largest_difference(weights(rm), weights(tmp_path / "rm")) < 1e-4
    assert largest_difference(weights(ppo), weights(launched["cpu2"] / "ppo")) < 1e-4
    assert largest_difference(weights(ppo), weights(sft)) > 1e-3


@pytest.mark.parts("adapters")
@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU_LONG_WITH_ZERO)
def test_adapters_are_those_of_one_process(
    name: str, inputs: Path, launched: Launched, tmp_path: Path
) -> None:
    """All four roles of PPO share a base, but under ZeRO-3."""
    fine_tune(sft_settings(inputs, tmp_path / "sft", lora=LORA))
    sft, rm, ppo = (launched[name] / "adapters" / stage for stage in ("sft", "rm", "ppo"))
    assert largest_difference(adapter(sft), adapter(tmp_path / "sft")) < 1e-5
    assert largest_of_b(sft) > 1e-3  # B starts as zeros
    train_reward_model(rm_settings(inputs, sft, tmp_path / "rm", lora=LORA))
    assert largest_difference(adapter(rm), adapter(tmp_path / "rm")) < 1e-4
    load_reward_model(ModelSettings(path=str(rm)), micro_batch_tokens=100, allow_chance_reward=True)
    first = adapter(launched["cpu2"] / "adapters" / "ppo")
    assert largest_difference(adapter(ppo), first) < 1e-4
    assert largest_difference(adapter(ppo), adapter(sft)) > 1e-3
    assert json.loads((ppo / "base.json").read_text())["path"] == str(inputs / "base")


@pytest.mark.parts("gradients")
@pytest.mark.slow
@pytest.mark.parametrize(("launched_by", "name"), files_for_gpus(LONG))
def test_files_for_gpus_give_the_same_gradients(
    launched_by: str, name: str, launched: Launched, of_one_process: Step
) -> None:
    """As far as bfloat16 goes: PPO's is the sum of the episodes' and the text's, each once."""
    found = load_file(launched[launched_by] / f"{name}.safetensors")
    kind, precision = read(launched[launched_by] / "seen.json")["files"][name]["at work"]
    kinds = {"gpu": "NO", "multi_gpu": "MULTI_CPU", "fsdp2": "FSDP"}
    assert (kind, precision) == (kinds.get(on_one_node(name), "DEEPSPEED"), "bf16")
    expected = of_one_process.gradients
    for loss in ("ppo", "rm", "sft"):
        own = {k: value for k, value in expected.items() if k.startswith(f"{loss}/")}
        largest = max(float(value.abs().max()) for value in own.values())
        assert largest_difference(found, own) < 0.1 * largest, loss
    names = [k for k in expected if k.startswith("ppo/policy.")]
    total, got = (torch.cat([g[k].flatten() for k in names]) for g in (expected, found))
    alone = ppo_step(PtxSettings(coef=0.0)).gradients
    episodes = torch.cat([alone[k.removeprefix("ppo/")].flatten() for k in names])
    parts = torch.stack([episodes, total - episodes], dim=1)
    shares = torch.linalg.lstsq(parts, got[:, None]).solution.flatten()
    assert shares.tolist() == pytest.approx([1.0, 1.0], abs=0.05)


@pytest.mark.parts("chain")
@pytest.mark.slow
@pytest.mark.parametrize(("launched_by", "name"), FOR_GPUS)
def test_stages_under_files_for_gpus(launched_by: str, name: str, launched: Launched) -> None:
    """SFT, reward model and PPO-ptx run one after another, as near to float32 as bfloat16 is."""
    own = launched[launched_by] / name
    in_float32 = launched[launched_by if launched_by in FILES_FOR_GPUS else "cpu2"]
    for stage, key, tolerance in (
        ("sft", "held_out_loss", 0.02),
        ("rm", "log_loss", 0.05),
    ):
        found, expected = (read(at / stage / "results.json")[key] for at in (own, in_float32))
        assert found == pytest.approx(expected, abs=tolerance), stage
    assert math.isfinite(read(own / "ppo" / "results.json")["held_out_score"])
    for stage in ("sft", "ppo"):
        folder = own / stage
        _, report = load_with_report(AutoModelForCausalLM, folder)
        assert not any(report.values()), (stage, report)
    load_reward_model(  # scores its golden rows again
        ModelSettings(path=str(own / "rm")), micro_batch_tokens=100, allow_chance_reward=True
    )


@pytest.mark.parts("adapters")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("launched_by", "name"),
    [pair for pair in files_for_gpus("cpu2_zero3") if pair.values[1] in WITH_ADAPTERS],
)
def test_adapters_under_files_for_gpus(launched_by: str, name: str, launched: Launched) -> None:
    adapters = launched[launched_by] / name / "adapters"
    assert largest_difference(adapter(adapters / "ppo"), adapter(adapters / "sft")) > 1e-3


@pytest.mark.parts("chain")
@pytest.mark.slow
@pytest.mark.parametrize(("launched_by", "name"), FOR_GPUS)
def test_precision_under_files_for_gpus(launched_by: str, name: str, launched: Launched) -> None:
    """Frozen models compute in bfloat16; log-probabilities, values and scores are float32.

    The reference has the policy's weights in the type in which the policy computes. So both agree
    until the policy moves."""
    seen = read(launched[launched_by] / "seen.json")["files"][name]
    is_whole = on_one_node(name) in ("gpu", "multi_gpu")
    reference = "torch.float32" if is_whole else "torch.bfloat16"
    assert {one["type"] for one in seen["rollouts"]} == {reference}
    before, *_, after = (one["difference"] for one in seen["rollouts"])
    assert before < 1e-5 < after
    assert set(seen["scored in"]) == {"torch.bfloat16"}
    rm, ppo = seen["prepared"]
    assert rm["types"] == ppo["types"] == ["torch.float32"]
    # FSDP2 gathers one layer at a time: two of the policy, two of the value model, and the rest.
    assert [rm["units"], ppo["units"]] == ([3, 5] if on_one_node(name) == "fsdp2" else [0, 0])


@pytest.mark.parts("stops")
@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU_LONG_WITH_ZERO)
def test_nan_on_one_process_stops_all(name: str, launched: Launched) -> None:
    """Each says where it was, and the replay has the row, though the first process writes it and
    the last one has it."""
    first, last = read(launched[name] / "seen.json")["stopped"]
    assert first == last
    assert first.startswith("PPO_NONFINITE at update 1: logprobs is not finite in phase train of")
    folder = launched[name] / "stopped"
    replay = read(folder / "nonfinite.json")
    assert replay["tensor"] == "logprobs" and replay["responses"][0]
    good = weights(folder / "last_good")
    assert all(weight.isfinite().all() for weight in good.values())
    assert largest_difference(good, weights(launched[name] / "sft")) > 1e-4
    assert not (folder / "results.json").exists()


@pytest.mark.parts("stops")
@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU_LONG_WITH_ZERO)
def test_nan_in_one_sampler_stops_all(name: str, launched: Launched) -> None:
    first, last = read(launched[name] / "seen.json")["stopped_sampling"]
    assert first == last
    assert first.startswith("PPO_NONFINITE at update 0: logits is not finite in phase rollout")
    assert read(launched[name] / "stopped_sampling" / "nonfinite.json")["tensor"] == "logits"


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_folders_are_plain_ones(name: str, launched: Launched) -> None:
    for stage, auto_class in (
        ("sft", AutoModelForCausalLM),
        ("rm", AutoModelForSequenceClassification),
        ("ppo", AutoModelForCausalLM),
    ):
        folder = launched[name] / stage
        assert all(weight.numel() > 0 for weight in weights(folder).values())
        _, report = load_with_report(auto_class, folder)
        assert not any(report.values()), (stage, report)
    load_reward_model(  # scores its golden rows again
        ModelSettings(path=str(launched[name] / "rm")),
        micro_batch_tokens=100,
        allow_chance_reward=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_weights_are_gathered_once_a_rollout(name: str, launched: Launched) -> None:
    seen = read(launched[name] / "seen.json")
    expected = greedy_rollouts(1, 12)
    assert [one["responses"] for one in seen["greedy"]] == [one["responses"] for one in expected]
    assert {len(response) for response in seen["greedy"][1]["responses"]} == {1, 10, 12}
    of_one_token, of_twelve = (one["gathers"] for one in seen["greedy"])
    assert of_one_token == of_twelve
    assert (of_twelve > 0) == (name == "cpu2_zero3")
    # In a rollout of PPO, the processes ask each other (in two small gathers, of sizes and of what
    # they are of) whether a sampler met NaN. ZeRO-3 also gathers the policy and the value model.
    gathers = {one["gathers"] for one in seen["rollouts"]}
    assert len(gathers) == 1
    assert (gathers == {2}) == (name != "cpu2_zero3")
    assert max(one["tokens"] for one in seen["rollouts"]) > 1


@pytest.mark.parts("chain", "adapters")
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", TWO_NODES)
def test_two_nodes_do_what_one_does(name: str, launched: Launched) -> None:
    """SFT, reward model and PPO-ptx, by two launches that found each other."""
    by, same = TWO_NODES[name]
    own, of_one_node = launched[name] / name, launched[by] / same
    for stage in ("sft", "rm", "ppo"):
        assert largest_difference(weights(own / stage), weights(of_one_node / stage)) < 1e-4, stage
    if name in WITH_ADAPTERS:
        for stage in ("sft", "rm", "ppo"):
            some, others = (adapter(at / "adapters" / stage) for at in (own, of_one_node))
            assert largest_difference(some, others) < 1e-4, stage
    told = read(launched[name] / "seen.json")["files"][name]["told"]
    assert [(one["RANK"], one["LOCAL_RANK"]) for one in told] == [("0", "0"), ("1", "0")]
    assert [(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"]) for one in told] == [("2", "1")] * 2


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", TWO_NODES)
def test_a_node_on_a_disk_of_its_own_is_refused(name: str, launched: Launched) -> None:
    """The first process says the same as the one that misses something."""
    refused = read(launched[name] / "seen.json")["files"][name]["refused"]
    for of_first, of_second in refused.values():
        assert of_first == of_second
        assert of_first.startswith("process 1 of 2, on ")
    assert "sft is not the output_dir that the first process writes" in refused["output"][0]
    told = "sft reads demonstrations from demonstrations.jsonl, which does not exist"
    assert told in refused["input"][0]


def whole_in_passes(name: str) -> dict[str, list[bool]]:
    """Map each pass of a rollout to whether a process then holds policy and value model whole."""
    is_split = "zero3" in name or "fsdp2" in name
    expected = {
        "sample": [True, False],
        "check": [True, False],
        "raw_scores": [False, False],
        "ref_logprobs": [False, False],
        "compute_values": [False, True],
    }
    return {key: whole if is_split else [True, True] for key, whole in expected.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_CPU)
def test_a_rollout_holds_one_split_model_at_a_time(name: str, launched: Launched) -> None:
    seen = read(launched[name] / "seen.json")
    assert [one["whole"] for one in seen["rollouts"]] == [whole_in_passes(name)] * 3


@pytest.mark.parts("chain")
@pytest.mark.slow
@pytest.mark.parametrize(("launched_by", "name"), FOR_GPUS)
def test_a_rollout_under_files_for_gpus_holds_one_split_model_at_a_time(
    launched_by: str, name: str, launched: Launched
) -> None:
    seen = read(launched[launched_by] / "seen.json")["files"][name]
    assert [one["whole"] for one in seen["rollouts"]] == [whole_in_passes(name)] * 3


@pytest.mark.parts()
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("launched_by", "name"), [("cpu2", "fsdp2"), ("cpu2_zero3", None)])
def test_an_engine_with_a_copy_is_given_one_split_weight_at_a_time(
    launched_by: str, name: str | None, kind: str, launched: Launched
) -> None:
    """Bit for bit the weights of the whole policy, in the type of its passes."""
    seen = read(launched[launched_by] / "seen.json")
    first, last = (seen if name is None else seen["files"][name])["streamed"][kind]
    assert first == last
    assert first["different"] == []
    assert first["types"] == ["torch.float32" if name is None else "torch.bfloat16"]
    checked = {**whole_in_passes("zero3"), "sample": [False, False]}
    assert first["whole"] == [checked, {k: v for k, v in checked.items() if k != "check"}]
    names = dict(tiny_policy_of("llama").named_parameters())
    assert list(first["gathered"]) == [
        one for one in names if kind == "weights" or one != "lm_head.weight"
    ]
    adapted = ("q_proj.weight", "down_proj.weight") if kind == "adapters" else ()
    for weight, gathered in first["gathered"].items():
        layer = weight.removesuffix(".weight")
        parts = ["base_layer", "lora_A.default", "lora_B.default"]
        expected = [f"{layer}.{part}.weight" for part in parts]
        assert gathered == (expected if weight.endswith(adapted) else [weight])


@pytest.mark.parts()
@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize(
    ("launched_by", "name"),
    [
        ("cpu2", "fsdp2"),
        pytest.param("two_nodes_fsdp2", "two_nodes_fsdp2", marks=pytest.mark.long),
    ],
)
def test_a_machine_converts_the_files_of_a_model_once(
    launched_by: str, name: str, kind: str, launched: Launched
) -> None:
    """Weights and gradients have the bits of those that each process converts by itself."""
    first, second = read(launched[launched_by] / "seen.json")["files"][name]["converted"][kind]
    assert len(first["loaded"]) == len(second["loaded"]) == 2  # the policy and the value model
    shared = set(first["loaded"]).intersection(second["loaded"])
    assert len(shared) == (2 if name == "fsdp2" else 0)
    for seen in (first, second):
        assert seen["each"] == seen["split"] == []  # the memory is free after the split
        assert seen["different"] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [
        pytest.param(name, count, marks=[pytest.mark.parts(part), *marks])
        for name, part, counts, marks in (
            ("cpu2", "rows", FEW, []),
            ("cpu2", "more rows", MORE, [pytest.mark.long]),
            ("cpu2_zero3", "rows", FEW, [pytest.mark.long]),
        )
        for count in counts
    ],
)
def test_any_number_of_rows(
    name: str, count: int, inputs: Path, launched: Launched, tmp_path: Path
) -> None:
    """As many to train on and held out: nothing hangs, and every held-out row counts once."""
    results = {
        stage: read(launched[name] / f"{stage}{count}" / "results.json")
        for stage in ("sft", "rm", "ppo")
    }
    assert results["sft"]["num_train"] == results["sft"]["num_held_out"] == count
    assert results["rm"]["train_prompts"] == results["rm"]["prompts"] == count
    assert results["ppo"]["held_out_score"] == pytest.approx((2**count - 1) / count)
    if count % 2:
        fine_tune(sft_of(inputs, count, tmp_path / "sft"))
        train_reward_model(rm_of(inputs, count, tmp_path / "rm"))
        for stage, key in (("sft", "held_out_loss"), ("rm", "log_loss"), ("rm", "pair_accuracy")):
            alone = read(tmp_path / stage / "results.json")[key]
            assert results[stage][key] == pytest.approx(alone, abs=1e-5), key


@pytest.mark.parts("others")
@pytest.mark.slow
@pytest.mark.parametrize("name", in_float32("cpu2", "cpu2_zero3", long=["cpu2_zero3"]))
def test_pretrain_collect_and_evaluate(
    name: str, inputs: Path, launched: Launched, tmp_path: Path
) -> None:
    pretrain(pretrain_settings(inputs, tmp_path / "pretrain"))
    own = launched[name]
    assert largest_difference(weights(own / "pretrain"), weights(tmp_path / "pretrain")) < 1e-5
    rankings = (own / "collect" / "rankings.jsonl").read_text().splitlines()
    found = read(own / "collect" / "results.json")
    assert len(rankings) == NUM_PROMPTS - found["num_prompts_without_choice"] > 0
    num_ranked = sum(len(json.loads(row)["responses"]) for row in rankings)
    assert found["num_samples"] == NUM_PROMPTS * NUM_RESPONSES
    assert num_ranked + found["num_duplicates"] == found["num_samples"]
    evaluate(evaluate_settings(inputs, tmp_path / "evaluate"))
    alone = read(tmp_path / "evaluate" / "results.json")["base"]
    together = read(own / "evaluate" / "results.json")["base"]
    assert together.keys() == alone.keys()
    for name, value in together.items():
        assert value == pytest.approx(alone[name], abs=1e-5), name
    printed = (own / "printed.txt").read_text(encoding="utf-8")
    assert printed.count("evaluate: the first of 2 processes does all the work") == 1


def test_a_launch_that_failed_is_not_started_again(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another launch still is."""
    started: list[str] = []

    def start(_self: Launched, name: str, _folder: Path) -> None:
        started.append(name)
        assert name != "cpu2", "a process ended with 1"

    monkeypatch.setattr(Launched, "_start", start)
    launched = Launched(tmp_path, tmp_path_factory, {})
    for message in ("a process ended with 1", "the launch of cpu2 failed in an earlier test"):
        with pytest.raises(AssertionError, match=message):
            launched["cpu2"]
    assert launched["cpu2_zero3"] == launched["cpu2_zero3"]
    assert started == ["cpu2", "cpu2_zero3"]


def test_a_plugin_that_is_not_at_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_plugin(DistributedType.MULTI_CPU)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    check_plugin(DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="asked for DEEPSPEED but MULTI_CPU is at work"):
        check_plugin(DistributedType.MULTI_CPU)
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="asked for FSDP but NO is at work"):
        check_plugin(DistributedType.NO)
    with pytest.raises(ValueError, match="fsdp_version is 1"):
        check_plugin(DistributedType.FSDP)


def test_a_lost_process_is_told_with_rank_phase_and_step() -> None:
    accelerator = Accelerator(cpu=True)
    place = "phase train of update 3"
    with (
        pytest.raises(TimeoutError, match=f"process 0 of 1 waited too long .* in {place}"),
        naming(accelerator, lambda: place),
    ):
        raise RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms")
    with pytest.raises(RuntimeError, match="no collective"), naming(accelerator, lambda: place):
        raise RuntimeError("no collective's error")


def on_one_node(name: str) -> str:
    """Return the file for one node that has the settings of this one."""
    return TWO_NODES[name][1] if name in TWO_NODES else name


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def largest_of_b(folder: Path) -> float:
    return max(float(w.abs().max()) for name, w in adapter(folder).items() if "lora_B" in name)


def largest_difference(some: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    return max(float((some[name] - other).abs().max()) for name, other in others.items())
