"""Tests the rm stage: its gradient, what it leaves out, what it learns and what it writes."""

import json
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, modeling_utils

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import write_records
from rlhf.inputs.packing import Layout, Packer, PromptTree
from rlhf.inputs.records import Demonstration, Ranking
from rlhf.measuring.statistics import wilson_interval
from rlhf.models.loading import load_scalar, new_policy
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.models import load_reward_model
from rlhf.training.settings import OptimSettings
from rlhf.training.step import make_train_state
from stages.rm import pair_metrics
from stages.rm.batches import GlobalBatches, make_comparisons
from stages.rm.config import Config
from stages.rm.data import Example, make_examples, read_rankings
from stages.rm.pair_metrics import Pair
from stages.rm.saved import check_saved_head
from stages.rm.train import train
from stages.rm.update import update
from tests.rlhf.plain_loading import load_with_report
from tests.rlhf.tiny_models import byte_tokenizer

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
}


@pytest.fixture(scope="module", params=sorted(ARCHITECTURES))
def sft(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("rm") / "sft"
    tokenizer = byte_tokenizer("<end>", "<pad>", eos_token="<end>", pad_token="<pad>")
    architecture = {"model_type": request.param, **ARCHITECTURES[request.param]}
    save_policy(new_policy(architecture, tokenizer), tokenizer, folder)
    return folder


def make_rankings(num: int, seed: int = 0) -> list[Ranking]:
    """Make rankings in which responses with the letter a win over those without; equals tie."""
    generator = random.Random(seed)
    rankings = []
    for i in range(num):
        words = ["".join(generator.choices("bcdefg", k=generator.randint(2, 6))) for _ in range(4)]
        winners = [word[:1] + "a" + word[1:] for word in words[:2]]
        responses = (*winners, *words[2:])
        rankings.append(Ranking(f"q{i}", responses, (1, 1, 2, 2), source=f"file {i % 2}"))
    return rankings


def soften(ranking: Ranking) -> Ranking:
    """Return the ranking of a judge who is 90 % sure of every pair, but undecided about 0 and 1."""
    probabilities = ((0, 1, 0.5), *((i, j, 0.9) for i, j in ranking.pairs()))
    return replace(ranking, ranks=(None,) * len(ranking.ranks), probabilities=probabilities)


def make_config(sft: Path, rankings: Sequence[Ranking], **changes: Any) -> Config:
    """Return settings of a short run on these rankings, in files beside the model."""
    work = sft.parent
    write_records(work / "rankings.jsonl", rankings)
    demonstrations = [Demonstration(r.prompt, r.responses[0]) for r in rankings[:20]]
    write_records(work / "demonstrations.jsonl", demonstrations)
    settings: dict[str, Any] = {
        "output_dir": str(work / "rm"),
        "model": ModelSettings(path=str(sft)),
        "rankings": [str(work / "rankings.jsonl")],
        "held_out": 0.25,
        "demonstrations": str(work / "demonstrations.jsonl"),
        "batch_size": 8,
        "num_epochs": 2,
        "micro_batch_tokens": 512,
        "optim": OptimSettings(learning_rate=3e-3),
    }
    return Config(**{**settings, **changes})


def make_gold(path: str) -> Any:
    """Make a gold score, the share of the letter a."""
    return lambda prompts, responses: [r.count("a") / max(len(r), 1) for r in responses]


@pytest.fixture(scope="module")
def trained(sft: Path) -> tuple[Config, dict[str, Any]]:
    rankings = [soften(r) if i % 3 == 0 else r for i, r in enumerate(make_rankings(140))]
    config = make_config(sft, rankings, gold="tests.stages.test_rm:make_gold", gold_path=str(sft))
    train(config)
    return config, json.loads((Path(config.output_dir) / "results.json").read_text())


def test_learns_what_people_prefer(trained: tuple[Config, dict[str, Any]]) -> None:
    config, results = trained
    low, high = results["pair_accuracy_interval"]
    assert results["pair_accuracy"] > 0.9 and low <= results["pair_accuracy"] <= high
    assert results["pair_accuracy_gold"] > 0.8 > results["length_baseline"]
    assert results["pairs"] == 4 * results["prompts"] > 4 * results["undecided_pairs"] > 0
    assert results["steps"] == 2 * math.ceil(results["train_prompts"] / 8)
    assert set(results["by_source"]) == {"file 0", "file 1"}
    lines = (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    # Scores of a new head spread by about 1, which adds at most a quarter to ln 2.
    assert metrics[0]["rm/loss"] == results["first_loss"] == pytest.approx(math.log(2), abs=0.3)
    held_out = [row for row in metrics if "rm/held_out_loss" in row]
    assert [row["step"] for row in held_out] == [results["steps"] // 2, results["steps"]]
    assert held_out[-1] == {
        "step": results["steps"],
        "rm/held_out_accuracy": results["pair_accuracy"],
        "rm/held_out_loss": results["log_loss"],
        "rm/held_out_accuracy_gold": results["pair_accuracy_gold"],
    }
    rates = [row["rm/learning_rate"] for row in metrics if "rm/learning_rate" in row]
    assert (rates[0], rates[-1]) == (pytest.approx(3e-3), pytest.approx(3e-4))


def test_figures_between_epochs_are_of_the_model_then_and_leave_training_alone(
    sft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a constant rate, one epoch ends where two are halfway. Measuring changes no weight."""
    optim = OptimSettings(learning_rate=3e-3, schedule="constant")
    rankings = make_rankings(48)
    runs = {}
    for name, num_epochs in (("one", 1), ("two", 2), ("unmeasured", 2)):
        if name == "unmeasured":
            monkeypatch.setattr("stages.rm.train.measure", lambda *_: {})
        folder = tmp_path / name
        train(
            make_config(sft, rankings, output_dir=str(folder), num_epochs=num_epochs, optim=optim)
        )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        runs[name] = [row for row in rows if "rm/held_out_loss" in row], folder
    (one, _), (two, measured), (unmeasured, plain) = runs.values()
    assert [len(one), len(two), len(unmeasured)] == [1, 2, 1]
    assert one[0] == pytest.approx(two[0], abs=1e-6)
    assert two[1] == unmeasured[0] != two[0]
    assert (measured / "model.safetensors").read_bytes() == (
        plain / "model.safetensors"
    ).read_bytes()


def test_gradient_checkpointing_changes_no_result(sft: Path, tmp_path: Path) -> None:
    rankings = make_rankings(24)
    losses = []
    for checkpointing in (False, True):
        output = tmp_path / f"rm_{checkpointing}"
        changes = {"output_dir": str(output), "gradient_checkpointing": checkpointing}
        config = make_config(sft, rankings, num_epochs=1, **changes)
        with patch.object(modeling_utils, "checkpoint", wraps=modeling_utils.checkpoint) as calls:
            train(config)
        assert bool(calls.call_count) == checkpointing
        rows = [json.loads(line) for line in (output / "metrics.jsonl").open()]
        losses.append([row["rm/loss"] for row in rows if "rm/loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_flex_attention_changes_no_result(sft: Path, tmp_path: Path) -> None:
    losses = []
    for attention in ("sdpa", "flex_attention"):
        run = tmp_path / attention
        model = ModelSettings(path=str(sft), attention=attention)
        train(make_config(sft, make_rankings(24), output_dir=str(run), model=model, num_epochs=1))
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([row["rm/loss"] for row in rows if "rm/loss" in row])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)


def test_any_tool_reads_the_same_scores(trained: tuple[Config, dict[str, Any]]) -> None:
    config, results = trained
    plain, report = load_with_report(AutoModelForSequenceClassification, config.output_dir)
    assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    reward = load_reward_model(ModelSettings(path=config.output_dir), micro_batch_tokens=512)
    rankings = make_rankings(8, seed=5)
    rows = [(r.prompt, response) for r in rankings for response in r.responses]
    prompts = [reward.chat.prompt_ids(prompt) for prompt, _ in rows]
    responses = [reward.chat.response_ids(response) for _, response in rows]
    batch = load_tokenizer(config.output_dir).pad(
        [{"input_ids": p + r} for p, r in zip(prompts, responses, strict=True)],
        return_tensors="pt",
        padding_side="right",
    )
    with torch.no_grad():
        raw = plain.eval()(**batch).logits.squeeze(1)
    scores = reward.scores(prompts, responses)
    assert scores.std() > 0.5
    torch.testing.assert_close(scores, raw - results["bias"], atol=1e-5, rtol=1e-5)


def test_demonstrations_score_0_on_average(trained: tuple[Config, dict[str, Any]]) -> None:
    config, results = trained
    reward = load_reward_model(ModelSettings(path=config.output_dir), micro_batch_tokens=512)
    rankings = make_rankings(140)[:20]
    scores = reward.scores(
        [reward.chat.prompt_ids(r.prompt) for r in rankings],
        [reward.chat.response_ids(r.responses[0]) for r in rankings],
    )
    assert abs(results["bias"]) > 0.1
    assert scores.mean().item() == pytest.approx(0.0, abs=1e-5)


def gradient(
    sft: Path, config: Config, examples: list[Example], packer: Packer
) -> tuple[float, torch.Tensor]:
    torch.manual_seed(3)
    model = load_scalar(ModelSettings(path=str(sft)), new_head=True)
    accelerator = Accelerator(cpu=True)
    state = make_train_state(model, [(model, 1e-3)], config.optim, 10, accelerator)
    metrics = update(state, examples, packer, config)
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return metrics["rm/loss"], torch.cat(parts)


def test_gradient_is_that_of_the_plain_sum_however_it_is_packed(sft: Path, tmp_path: Path) -> None:
    rankings = [
        Ranking("two", ("bc", "d"), (2, 1)),
        Ranking("five", ("b", "cd", "efg", "bb", "c"), (3, 1, 1, None, 2)),
        Ranking("three", ("gg", "a", "ff"), (1, 2, 3), weight=2.5),
        Ranking(
            "soft",
            ("c", "ba", "dd", "a"),
            (None,) * 4,
            probabilities=((0, 1, 0.3), (3, 1, 0.5), (1, 2, 1.0)),
            weight=0.5,
        ),
    ]
    config = make_config(sft, rankings, output_dir=str(tmp_path / "run"), margin_per_rank=0.4)
    config = replace(config, optim=OptimSettings(max_grad_norm=math.inf))
    chat = Chat(load_tokenizer(str(sft)))
    examples, _ = make_examples(rankings, chat, config, for_training=True)
    plain_loss, plain = plain_gradient(sft, chat, rankings, margin_per_rank=0.4)
    layouts = [Packer(512), Packer(64), Packer(1), Packer(512, layout=Layout.ALONE)]
    layouts += [Packer(512, layout=Layout.BLOCKS)]
    for packer in [*layouts, Packer(512, max_depth=max(e.tree.depth for e in examples) - 1)]:
        loss, found = gradient(sft, config, examples, packer)
        assert loss == pytest.approx(plain_loss, abs=1e-5)
        torch.testing.assert_close(found, plain, atol=1e-5, rtol=1e-4)


def plain_gradient(
    sft: Path, chat: Chat, rankings: Sequence[Ranking], margin_per_rank: float
) -> tuple[float, torch.Tensor]:
    """Return loss and gradient pair by pair, with each response alone in a pass."""
    torch.manual_seed(3)
    model = load_scalar(ModelSettings(path=str(sft)), new_head=True)
    total = torch.zeros(())
    for ranking in rankings:
        scores = [
            model.classifier(
                torch.tensor([chat.prompt_ids(ranking.prompt) + chat.response_ids(response)])
            ).logits[0, 0]
            for response in ranking.responses
        ]
        labels = [(i, j, 1.0) for i, j in ranking.pairs()]
        if ranking.probabilities:
            labels = [*ranking.probabilities, *((j, i, 1 - p) for i, j, p in ranking.probabilities)]
        loss = torch.zeros(())
        for i, j, p in labels:
            apart = (ranking.ranks[j] or 0) - (ranking.ranks[i] or 0)
            loss = loss - p * logsigmoid(scores[i] - scores[j] - margin_per_rank * apart)
        num_pairs = len(ranking.probabilities) or len(labels)
        total = total + ranking.weight * loss / num_pairs / sum(r.weight for r in rankings)
    total.backward()
    parts = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return total.item(), torch.cat(parts)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_every_ranking_is_seen_once_an_epoch_on_any_number_of_processes(num_processes: int) -> None:
    config = cast(Config, SimpleNamespace(batch_size=4, seed=7))
    epochs = []
    for index in range(num_processes):
        process = SimpleNamespace(process_index=index, num_processes=num_processes)
        batches = GlobalBatches(9, config, cast(Accelerator, process))
        epochs.append([list(batches), list(batches)])
        assert [len(batches)] == [3]
    for epoch in range(2):
        steps = list(zip(*[epochs[index][epoch] for index in range(num_processes)], strict=True))
        assert [sum(len(share) for share in step) for step in steps] == [4, 4, 1]
        assert sorted(i for step in steps for share in step for i in share) == list(range(9))
    assert epochs[0][0] != epochs[0][1]


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(byte_tokenizer("<end>", "<pad>", eos_token="<end>", pad_token="<pad>"))


def limits(**changes: Any) -> Config:
    settings: dict[str, Any] = {
        "output_dir": "out",
        "model": ModelSettings(path="sft"),
        "rankings": ["rankings.jsonl"],
        "held_out": 0.5,
        "demonstrations": "demonstrations.jsonl",
    }
    return Config(**{**settings, **changes})


def test_ties_and_unranked_responses_are_not_trained_on(chat: Chat) -> None:
    rankings = [
        Ranking("tied", ("a", "b", "c"), (1, 1, None)),
        Ranking("some", ("a", "b", "c", "d"), (2, None, 1, 2)),
    ]
    (example,), counts = make_examples(rankings, chat, limits(), for_training=True)
    assert example.ranking == Ranking("some", ("a", "c", "d"), (2, 1, 2))
    assert (counts.kept, counts.without_pairs) == (1, 1)
    measured, _ = make_examples(rankings, chat, limits(), for_training=False)
    assert [example.ranking for example in measured] == rankings


def test_pairs_of_equal_responses_are_left_out_and_counted(chat: Chat) -> None:
    rankings = [
        Ranking("one", ("a", "b", "a"), (1, 2, 3)),
        Ranking("two", ("", ""), (1, 2)),
        Ranking("soft", ("x", "x", "y"), (None,) * 3, probabilities=((0, 1, 0.5), (0, 2, 0.9))),
    ]
    examples, counts = make_examples(rankings, chat, limits(), for_training=True)
    assert [example.ranking.responses for example in examples] == [("a", "b", "a"), ("x", "y")]
    assert (counts.equal_pairs, counts.without_pairs) == (3, 1)
    preferences = make_comparisons([example.ranking for example in examples], 0.0).preferences
    assert preferences[0].tolist() == [0, 1, 0, 0, 0]
    assert preferences[2].tolist() == [0, 0, 0, 0, 0]
    assert preferences[1].tolist() == [0, 0, 1, 0, 0]
    measured, _ = make_examples(rankings, chat, limits(), for_training=False)
    soft = make_comparisons([measured[2].ranking], 0.0).preferences
    assert soft[:, :2].count_nonzero() == 1  # y against x, and no pair between the two
    assert pair_metrics.label_preferences(measured) == [
        [(0, 1, 1.0), (1, 2, 1.0)],
        [],
        [(0, 2, 0.9)],
    ]


def test_even_pairs_are_trained_on_and_responses_without_a_probability_are_not(chat: Chat) -> None:
    soft = Ranking(
        "soft", ("a", "b", "c", "d"), (None,) * 4, probabilities=((3, 0, 0.5), (3, 2, 0.9))
    )
    (example,), _ = make_examples([soft], chat, limits(), for_training=True)
    assert example.ranking.responses == ("a", "c", "d")
    assert example.ranking.probabilities == ((2, 0, 0.5), (2, 1, 0.9))
    config = limits(max_responses=3)
    for seed in range(8):
        examples, counts = make_examples(
            [soft], chat, replace(config, seed=seed), for_training=True
        )
        kept = {response for one in examples for response in one.ranking.responses}
        assert kept in ({"a", "d"}, {"c", "d"}, {"a", "c", "d"}, set())
        assert counts.without_pairs == (not examples)


def test_long_responses_are_left_out_and_counted_never_cut(chat: Chat) -> None:
    rankings = [
        Ranking("q", ("short", "much too long", "s"), (1, 2, 3)),
        Ranking("r", ("fits", "much too long"), (1, 2)),
        Ranking("long prompt " * 9, ("a", "b"), (1, 2)),
    ]
    config = limits(max_prompt_tokens=40, max_response_tokens=6, max_dropped=1.0)
    (example,), counts = make_examples(rankings, chat, config, for_training=True)
    assert example.ranking.responses == ("short", "s")
    assert [len(response) for response in example.tree.responses] == [6, 2]
    assert counts.responses_too_long == counts.rankings_with_long_responses == 2
    assert (counts.prompts_too_long, counts.without_pairs, counts.rankings) == (1, 1, 3)
    told = r"3 of 3 rankings \(100.0%\).* max_dropped 0.5.* longest response has 14 tokens, the end"
    with pytest.raises(ValueError, match=told):
        make_examples(rankings, chat, replace(config, max_dropped=0.5), for_training=True)


def test_old_turns_go_first(chat: Chat) -> None:
    turns = [("user", "first"), ("assistant", "one"), ("user", "last")]
    messages = [{"role": role, "content": content} for role, content in turns]
    config = limits(max_prompt_tokens=len(chat.prompt_ids("last")))
    ranking = Ranking(messages, ("a", "b"), (1, 2))
    (example,), counts = make_examples([ranking], chat, config, for_training=True)
    assert example.tree.prompt == tuple(chat.prompt_ids("last"))
    assert example.is_cut and counts.prompts_cut == 1


def test_no_more_than_max_responses_are_trained_on(chat: Chat) -> None:
    rankings = [Ranking(f"q{i}", tuple("abcdef"), (1, 2, 3, 4, 5, 6)) for i in range(20)]
    config = limits(max_responses=3)
    examples, _ = make_examples(rankings, chat, config, for_training=True)
    assert {len(example.ranking.responses) for example in examples} == {3}
    assert len({example.ranking.responses for example in examples}) > 1
    assert make_examples(rankings, chat, config, for_training=True)[0] == examples


def test_held_out_prompts_are_never_trained_on(tmp_path: Path) -> None:
    rankings = make_rankings(12)
    write_records(tmp_path / "train.jsonl", rankings[:9])
    write_records(tmp_path / "measured.jsonl", rankings[6:])
    names = {
        "rankings": [str(tmp_path / "train.jsonl")],
        "held_out_rankings": [str(tmp_path / "measured.jsonl")],
        "held_out": None,
    }
    train_set, held_out = read_rankings(limits(**names))
    assert [r.prompt for r in train_set] == [f"q{i}" for i in range(6)]
    assert held_out == rankings[6:]
    assert len(read_rankings(limits(**names, max_held_out=2))[1]) == 2
    train_set, held_out = read_rankings(limits(**{**names, **split_of(0.5)}))
    assert not {r.prompt for r in train_set} & {r.prompt for r in held_out}


def split_of(share: float) -> dict[str, Any]:
    return {"held_out": share, "held_out_rankings": None}


def test_rankings_that_are_all_tied_are_refused(sft: Path, tmp_path: Path) -> None:
    rankings = [replace(r, ranks=(1, 1, 1, 1)) for r in make_rankings(20)]
    config = make_config(sft, rankings, output_dir=str(tmp_path / "rm"))
    with pytest.raises(ValueError, match=r"no training ranking .* orders two responses"):
        train(config)
    assert not (tmp_path / "rm").exists()


def test_a_file_without_a_head_is_refused(tmp_path: Path) -> None:
    for head in ({}, {"score.weight": torch.zeros(0)}, {"score.weight": torch.zeros(2, 4)}):
        save_file({"other": torch.zeros(1), **head}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="without the reward head"):
            check_saved_head(tmp_path, width=4)
    save_file({"score.weight": torch.zeros(1, 4)}, tmp_path / "model.safetensors")
    check_saved_head(tmp_path, width=4)
    assert load_file(tmp_path / "model.safetensors")["score.weight"].shape == (1, 4)


def test_figures_of_four_pairs() -> None:
    three = math.log(3)  # sigmoid is 0.75
    pairs = [
        Pair("p", "x", margin=three, length_margin=2),
        Pair("p", "x", margin=-three, length_margin=1),
        Pair("q", "y", margin=0.0, length_margin=-1),
        Pair("q", "y", margin=three, length_margin=0),
    ]
    share, (low, high) = pair_metrics.accuracy(pairs, seed=0)
    # A bootstrap gives (0.5, 0.75), which is too narrow for two prompts.
    assert share == 0.625 and (low, high) == wilson_interval(0.625, 2)
    assert pair_metrics.accuracy(pairs[:2], seed=0).interval == (0.0, 1.0)
    assert pair_metrics.length_accuracy(pairs, longer_wins=True) == 0.625
    assert pair_metrics.length_accuracy(pairs, longer_wins=False) == 0.375
    assert pair_metrics.does_longer_win(pairs) and not pair_metrics.does_longer_win(pairs[2:])
    expected = -(2 * math.log(0.75) + math.log(0.25) + math.log(0.5)) / 4
    assert pair_metrics.log_loss(pairs) == pytest.approx(expected)
    error, bins = pair_metrics.calibration(pairs)
    assert [row["pairs"] for row in bins] == [1, 3]
    assert error == pytest.approx(3 / 4 * (0.75 - 2 / 3))
    table = pair_metrics.by_source(pairs, seed=0)
    assert table["x"]["pair_accuracy"] == 0.5 and table["y"]["pair_accuracy"] == 0.75


def test_figures_against_soft_labels() -> None:
    three = math.log(3)  # sigmoid is 0.75
    pairs = [
        Pair("p", "x", margin=three, length_margin=1, probability=0.75),
        Pair("p", "x", margin=-three, length_margin=1, probability=0.75),
        Pair("q", "x", margin=0.0, length_margin=-1, probability=0.75),
        Pair("q", "y", margin=three, length_margin=-1, probability=0.5),
    ]
    assert pair_metrics.accuracy(pairs, seed=0).value == 0.5
    assert pair_metrics.length_accuracy(pairs, longer_wins=True) == pytest.approx(2 / 3)
    a, b = -math.log(0.75), -math.log(0.25)
    expected = [0.75 * a + 0.25 * b, 0.75 * b + 0.25 * a, math.log(2), 0.5 * a + 0.5 * b]
    assert pair_metrics.log_loss(pairs) == pytest.approx(sum(expected) / 4)
    error, bins = pair_metrics.calibration(pairs)
    assert [(row["pairs"], row["accuracy"]) for row in bins] == [(1, 0.5), (3, 0.5)]
    assert error == pytest.approx(3 / 4 * 0.25)
    found = pair_metrics.describe_pairs(pairs, seed=0)
    assert (found["pairs"], found["undecided_pairs"], found["prompts"]) == (3, 1, 2)
    assert math.isnan(pair_metrics.by_source(pairs, seed=0)["y"]["pair_accuracy"])


def test_gold_ties_make_no_pairs() -> None:
    tree = PromptTree((1,), ((2,), (3,), (4, 4)))
    example = Example(tree, Ranking("q", ("a", "b", "c"), (None,) * 3), is_cut=False)
    gold = {"a": 0.5, "b": 2.0, "c": 0.5}
    preferences = pair_metrics.gold_preferences(
        [example], lambda _, texts: [gold[t] for t in texts]
    )
    pairs = pair_metrics.compare([example], [[0.0, 1.0, 3.0]], preferences)
    assert [(pair.margin, pair.length_margin) for pair in pairs] == [(1.0, 0), (-2.0, -1)]
    assert pair_metrics.label_preferences([example]) == [[]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"rankings": []}, "rankings is empty"),
        ({"held_out": None}, "exactly one"),
        ({"held_out_rankings": ["other.jsonl"]}, "exactly one"),
        ({"held_out": 1.0}, "held_out is 1.0"),
        ({"gold": "a:b"}, "gold_path is None; give both or neither"),
        ({"max_responses": 1}, "max_responses is 1; give a number: 2 or more"),
        ({"max_held_out": 5}, "held_out_rankings is not given"),
        ({"margin_per_rank": -0.1}, "margin_per_rank is -0.1"),
        ({"margin_per_rank": math.inf}, "margin_per_rank is inf"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_dropped": 2.0}, "max_dropped is 2.0"),
    ],
)
def test_contradictory_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        limits(**changes)
