"""Tests the sft stage: which tokens are learnt, what is left out, which checkpoint is kept."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf.generation.engines import generate
from rlhf.generation.interface import Decoding
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.files import write_records
from rlhf.inputs.packing import Packer, PromptTree, text_tree
from rlhf.inputs.records import Demonstration, PromptLike, Text
from rlhf.models.loading import load_policy, load_scalar, new_policy
from rlhf.models.passes import compute_scores
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.rewards.models import GoldenRow, RewardCard
from rlhf.rewards.rendering import rendering_hash
from rlhf.runs.checkpoints import Checkpoints
from rlhf.runs.run import Run, open_run
from rlhf.runs.settings import load_config
from rlhf.training.processes import start_accelerator
from rlhf.training.settings import OptimSettings
from stages.sft import train as train_module
from stages.sft.config import Config
from stages.sft.glossary import METRICS
from stages.sft.measure import different_prompts, draw_samples, mean_loss, sample_rows
from stages.sft.rows import cut_text, fit_batches, load_rows, order_epochs, render
from stages.sft.train import train
from stages.sft.trainer import Measure, fit, make_trainer, to_row
from tests.rlhf.generation.fake_vllm import FakeLLM, vllm_installed
from tests.rlhf.plain_loading import load_with_report
from tests.rlhf.tiny_models import byte_tokenizer

LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random model whose tokenizer pads with its end token, as many on the hub do."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sft") / "base"
    tokenizer = byte_tokenizer("<end>", "<pad>", eos_token="<end>", pad_token="<end>")
    model = new_policy(LLAMA, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def chat(base: Path) -> Chat:
    return Chat(AutoTokenizer.from_pretrained(base))


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    path = tmp_path / "demonstrations.jsonl"
    letters = "abcdefghijklmn"
    write_records(path, [Demonstration(letter, 2 * letter.upper()) for letter in letters])
    return path


def make_config(base: Path, demonstrations: Path | str, tmp_path: Path, **changes: Any) -> Config:
    settings: dict[str, Any] = {
        "model": ModelSettings(path=str(base)),
        "demonstrations": str(demonstrations),
        "held_out": 0.2,
        "max_prompt_tokens": 40,
        "max_response_tokens": 8,
        "batch_size": 4,
        "micro_batch_size": 2,
        "optim": OptimSettings(learning_rate=1e-2),
        "max_text_tokens": 64,
        "num_samples": 4,
        "output_dir": str(tmp_path / "sft"),
    }
    return Config(**{**settings, **changes})


def losses_of_batches(trees: list[PromptTree], config: Config, chat: Chat, tmp_path: Path) -> Any:
    """Return the batches that reach the loss, collated by the trainer."""
    policy = load_policy(config.model)
    trainer = make_trainer(policy, chat.tokenizer, trees, config, str(tmp_path / "checkpoints"))
    return list(trainer.get_train_dataloader())


def test_loss_sees_the_response_and_its_end_only(
    base: Path, chat: Chat, demonstrations: Path, tmp_path: Path
) -> None:
    config = make_config(base, demonstrations, tmp_path)
    examples, _ = render([Demonstration("hi", "yes"), Demonstration("a", "")], chat, 40, 8)
    (batch,) = losses_of_batches([one.tree for one in examples], config, chat, tmp_path)
    for row, example in enumerate(examples):
        prompt, (response,) = example.tree.prompt, example.tree.responses
        width = batch["labels"].shape[1]
        unused = width - len(prompt) - len(response)
        expected = [-100] * len(prompt) + list(response) + [-100] * unused
        assert response[-1] == chat.end_id
        assert batch["labels"][row].tolist() == expected
        assert batch["input_ids"][row, : len(prompt)].tolist() == list(prompt)
        assert batch["attention_mask"][row].sum() == len(prompt) + len(response)


def test_text_is_learnt_whole_but_for_the_token_that_is_given(
    base: Path, chat: Chat, demonstrations: Path, tmp_path: Path
) -> None:
    config = make_config(base, demonstrations, tmp_path)
    pieces = cut_text([Text("abcdefgh")], chat, 5, random.Random(0))
    (batch,) = losses_of_batches(pieces, config, chat, tmp_path)
    found = sorted(row[row != -100].tolist() for row in batch["labels"])
    ids = chat.text_ids("abcdefgh")
    assert found == sorted([ids[1:5], ids[6:8]])


def fit_alone(
    policy: PreTrainedModel, chat: Chat, trees: Any, config: Config, run: Run, measure: Measure
) -> tuple[Path, int]:
    """Call `fit` in a run that writes no checkpoints."""
    checkpoints = Checkpoints(run, start_accelerator(), None)
    return fit(policy, chat.tokenizer, trees, config, run, checkpoints, {}, measure)


def test_first_step_logs_the_mean_loss_of_its_batchs_trained_tokens(
    base: Path, chat: Chat, demonstrations: Path, tmp_path: Path
) -> None:
    """Micro-batches differ in length, so a mean of their means would be another number."""
    config = make_config(base, demonstrations, tmp_path)
    examples, _ = render(
        [Demonstration(a, a * n) for a, n in (("a", 1), ("b", 6), ("c", 3))], chat, 40, 8
    )
    trees = [*(one.tree for one in examples), text_tree(chat.text_ids("some text here"))]
    policy = load_policy(config.model)
    expected = mean_loss(policy, trees, Packer(512))
    run = open_run(config, stage="sft", inputs={})
    fit_alone(policy, chat, trees, config, run, lambda policy, step: {"sft/held_out_loss": 1.0})
    logged = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    (first,) = [row for row in logged if "sft/loss" in row]
    assert first["sft/loss"] == pytest.approx(expected, abs=1e-5)
    assert first["sft/learning_rate"] == pytest.approx(1e-2)


def test_micro_batches_do_not_change_the_weights(
    base: Path, chat: Chat, demonstrations: Path, tmp_path: Path
) -> None:
    trees = [text_tree(chat.text_ids("x" * length)) for length in (3, 9, 4, 12)]
    weights = []
    for size in (1, 4):
        # A large eps keeps Adam's first step from dividing rounding noise by a gradient near 0.
        optim = OptimSettings(learning_rate=1e-2, eps=1.0)
        config = make_config(base, demonstrations, tmp_path, micro_batch_size=size, optim=optim)
        policy = load_policy(config.model)
        make_trainer(policy, chat.tokenizer, trees, config, str(tmp_path / str(size))).train()
        weights.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    start = torch.cat([p.detach().flatten() for p in load_policy(config.model).parameters()])
    assert (weights[0] - start).abs().max() > 1e-4
    assert (weights[0] - weights[1]).abs().max() < 1e-6


def greedy(policy: PreTrainedModel, chat: Chat, prompts: Sequence[PromptLike]) -> list[str]:
    ids = [chat.prompt_ids(prompt) for prompt in prompts]
    settings = GenerationSettings(batch_size=4)
    responses = generate(
        policy, ids, settings, Decoding(end_id=chat.end_id, max_new_tokens=8, temperature=0)
    ).responses
    assert all(response[-1] == chat.end_id for response in responses)
    return [chat.decode(response) for response in responses]


def test_learns_its_rows_by_heart_ends_them_and_loads_anywhere(
    base: Path, chat: Chat, demonstrations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        base, demonstrations, tmp_path, num_epochs=40, eval_every=1000, temperature=0.0
    )
    prompts = [one.record.prompt for one in load_rows(config, chat).train]
    before: list[str] = []

    def save_and_remember(model: PreTrainedModel, tokenizer: Any, folder: Path) -> None:
        before.extend(greedy(model, chat, prompts))
        save_policy(model, tokenizer, folder)

    monkeypatch.setattr(train_module, "save_policy", save_and_remember)
    train(config)
    loaded, report = load_with_report(AutoModelForCausalLM, config.output_dir)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert before == [2 * str(prompt).upper() for prompt in prompts]
    assert greedy(loaded, Chat(AutoTokenizer.from_pretrained(config.output_dir)), prompts) == before
    assert loaded.generation_config.eos_token_id == [chat.end_id]
    results = json.loads((Path(config.output_dir) / "results.json").read_text())
    assert results["eos_rate"] == 1.0
    assert results["chosen_step"] == results["num_steps"]
    samples = (Path(config.output_dir) / "samples.jsonl").read_text().splitlines()
    assert len(samples) == min(4, results["num_held_out"])


@pytest.mark.parametrize("choose_by, best", [("held_out_loss", 4), ("reward_score", 2)])
def test_keeps_the_best_measured_checkpoint(
    base: Path, chat: Chat, demonstrations: Path, tmp_path: Path, choose_by: Any, best: int
) -> None:
    reward_model = "rm" if choose_by == "reward_score" else None
    config = make_config(
        base, demonstrations, tmp_path, eval_every=2, choose_by=choose_by, reward_model=reward_model
    )
    values = {0: 0.0, 2: 3.0, 4: 1.0, 5: 2.0}
    weights = {}

    def measure(policy: PreTrainedModel, step: int) -> dict[str, float]:
        weights[step] = next(policy.parameters()).detach().clone()
        return {f"sft/{choose_by}": values[step]}

    trees = [text_tree(chat.text_ids(letter * 4)) for letter in "abcdefghijklmnopqr"]
    run = open_run(config, stage="sft", inputs={})
    policy = load_policy(config.model)
    folder, step = fit_alone(policy, chat, trees, config, run, measure)
    assert step == best and sorted(weights) == sorted(values)
    kept = next(load_policy(ModelSettings(path=str(folder))).parameters())
    assert torch.equal(kept, weights[best])
    assert [child.name for child in folder.parent.iterdir()] == [folder.name]


def test_a_loss_that_is_never_a_number_stops(
    base: Path, chat: Chat, demonstrations: Path, tmp_path: Path
) -> None:
    config = make_config(base, demonstrations, tmp_path)
    run = open_run(config, stage="sft", inputs={})
    trees = [text_tree(chat.text_ids("abc"))]
    with pytest.raises(ValueError, match=r"not a number.*learning_rate 0\.01"):
        fit_alone(
            load_policy(config.model),
            chat,
            trees,
            config,
            run,
            lambda policy, step: {"sft/held_out_loss": float("nan")},
        )


def test_reward_model_chooses(base: Path, chat: Chat, demonstrations: Path, tmp_path: Path) -> None:
    save_reward_model(base, chat, tmp_path / "rm")
    text = tmp_path / "text.jsonl"
    write_records(text, [Text(f"text number {i}") for i in range(20)])
    config = make_config(
        base,
        demonstrations,
        tmp_path,
        text=str(text),
        choose_by="reward_score",
        reward_model=str(tmp_path / "rm"),
        eval_every=1,
    )
    train(config)
    folder = Path(config.output_dir)
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = {name for row in logged for name in row} - {"step"}
    assert names == {metric.name for metric in METRICS}
    scores = {row["step"]: row["sft/reward_score"] for row in logged if "sft/reward_score" in row}
    results = json.loads((folder / "results.json").read_text())
    del scores[0]  # the base model is measured, but not a candidate
    assert len(set(scores.values())) > 1
    assert results["chosen_step"] == max(scores, key=lambda step: scores[step])
    assert results["reward_score"] == pytest.approx(max(scores.values()), abs=1e-5)
    assert results["text_loss"] > 0
    first = json.loads((folder / "samples.jsonl").read_text().splitlines()[0])
    assert set(first) == {"step", "prompt", "response", "demonstration", "ended", "score"}


def save_reward_model(base: Path, chat: Chat, folder: Path) -> None:
    torch.manual_seed(1)
    model = load_scalar(ModelSettings(path=str(base)), new_head=True)
    model.save(folder, chat.tokenizer)
    tree = PromptTree(tuple(chat.prompt_ids("a")), (tuple(chat.response_ids("b")),))
    score = compute_scores(model, [tree], Packer(512)).item()
    RewardCard(
        bias=0.0,
        scale=1.0,
        pair_accuracy=0.8,
        interval=(0.7, 0.9),
        golden=(GoldenRow(prompt="a", response="b", score=score),),
        template_hash=chat.template_hash,
        rendering_hash=rendering_hash(chat),
    ).save(folder)


def test_lengths_are_counted_and_too_many_dropped_stop(
    base: Path, chat: Chat, tmp_path: Path
) -> None:
    turns = [
        {"role": "user", "content": "x" * 30},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "z"},
    ]
    records = [
        Demonstration(turns, "cut"),
        Demonstration("p" * 60, "dropped for its prompt"),
        Demonstration("q", "too long a response"),
        Demonstration("r", "1234567"),
    ]
    examples, report = render(records, chat, 40, 8)
    assert [one.record.response for one in examples] == ["cut", "1234567"]
    assert list(examples[0].tree.prompt) == chat.prompt_ids("z")
    assert (report.num_prompts_cut, report.num_prompts_dropped, report.num_responses_dropped) == (
        1,
        1,
        1,
    )
    path = tmp_path / "mixed.jsonl"
    fitting = [Demonstration(letter, letter) for letter in "abcdef"]
    write_records(path, [*records[1:3], *fitting])
    with pytest.raises(ValueError, match=r"2 of 8 demonstrations \(25\.0%\).*max_dropped 0\.05"):
        load_rows(make_config(base, path, tmp_path), chat)
    rows = load_rows(make_config(base, path, tmp_path, max_dropped=0.25), chat)
    assert len(rows.train) + len(rows.held_out) == 6 and rows.lengths.num_dropped == 2


def test_text_has_the_share_of_trained_tokens_that_was_asked_for(
    base: Path, chat: Chat, demonstrations: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.jsonl"
    write_records(text, [Text(f"{i:04d}") for i in range(200)])
    config = make_config(base, demonstrations, tmp_path, text=str(text), text_share=0.5)
    rows = load_rows(config, chat)
    num_response = sum(len(one.tree.responses[0]) for one in rows.train)
    num_text = sum(len(tree.responses[0]) for tree in rows.text)
    assert num_response <= num_text < num_response + 4
    trained = {tree.responses for tree in rows.text}
    assert not trained & {tree.responses for tree in rows.text_held_out}
    prompts = {one.tree.prompt for one in rows.train}
    assert not prompts & {one.tree.prompt for one in rows.held_out}
    measured_only = make_config(base, demonstrations, tmp_path, text=str(text), text_share=0.0)
    rows = load_rows(measured_only, chat)
    assert not rows.text and rows.text_held_out


def test_every_epoch_has_every_row_and_every_batch_is_full() -> None:
    trees = [text_tree(range(2 + i)) for i in range(10)]
    ordered = order_epochs(trees, 2, 4, seed=0)
    assert sorted(tree.num_tokens for tree in ordered) == sorted(2 * list(range(2, 12)))
    assert len({tree.num_tokens for tree in ordered[:8]}) == 8
    for start in range(0, 20, 4):
        sizes = [tree.num_tokens for tree in ordered[start : start + 4]]
        assert sizes == sorted(sizes, reverse=True)
    assert ordered == order_epochs(trees, 2, 4, seed=0) != order_epochs(trees, 2, 4, seed=1)
    filled = [tree.num_tokens for tree in order_epochs(trees, 3, 4, seed=0)]
    assert len(filled) == 32
    assert {filled.count(size) for size in range(2, 12)} == {3, 4}


@pytest.mark.parametrize(("num_processes", "full_batch_size"), [(1, 3), (2, 4), (8, 8)])
def test_an_epoch_of_few_rows_is_one_pass_whatever_the_batch(
    base: Path, tmp_path: Path, num_processes: int, full_batch_size: int
) -> None:
    config = make_config(base, "unused", tmp_path, batch_size=16)
    fitted = fit_batches(config, 3, num_processes)
    assert fitted.batch_size == full_batch_size and fitted.rows_per_pass(num_processes)
    trees = [text_tree(range(2 + i)) for i in range(3)]
    ordered = order_epochs(trees, 2, 3, 0, fitted.batch_size)
    assert len(ordered) == 2 * full_batch_size
    for start in (0, full_batch_size):
        assert sorted(tree.num_tokens for tree in ordered[start : start + 3]) == [2, 3, 4]
        idle = ordered[start + 3 : start + full_batch_size]
        assert all(sum(to_row(tree)["completion_mask"]) == 0 for tree in idle)
    assert fit_batches(config, 99, num_processes).batch_size == 16


def test_a_batch_larger_than_the_data_takes_each_row_once_an_epoch(
    base: Path, demonstrations: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(base, demonstrations, tmp_path, batch_size=1000, num_epochs=2)
    train(config)
    results = json.loads((Path(config.output_dir) / "results.json").read_text())
    assert results["num_steps"] == 2
    expected = f"batch_size is 1000, and there are {results['num_train']} rows to train on"
    assert expected in capsys.readouterr().out
    assert "dropped" not in results


def test_empty_responses_are_told_and_long_rows_named(
    base: Path, chat: Chat, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "d.jsonl"
    answers = ["", "much too long an answer"]
    write_records(file, [Demonstration(f"q{i}", answers[i % 2]) for i in range(20)])
    config = make_config(base, file, tmp_path, max_dropped=0.1)
    with pytest.raises(ValueError, match=r"10 of 20 .* are too long \(.*d\.jsonl, row \d+; "):
        load_rows(config, chat)
    rows = load_rows(replace(config, max_dropped=1.0), chat)
    assert rows.lengths.num_empty == 10
    assert "dropped" not in rows.lengths.as_metrics()


def test_samples_are_of_different_prompts(base: Path, chat: Chat, tmp_path: Path) -> None:
    records = [Demonstration(prompt, "x") for prompt in "aabbc"]
    examples, _ = render(records, chat, 40, 8)
    config = make_config(base, "unused", tmp_path, num_samples=3)
    chosen = different_prompts(examples, config.num_samples)
    assert [one.record.prompt for one in chosen] == ["a", "b", "c"]
    assert different_prompts(examples, 2) == chosen[:2]
    answers = draw_samples(load_policy(config.model), chosen, chat, config)
    assert [answer.record.prompt for answer in answers] == ["a", "b", "c"]
    rows = sample_rows(chosen, answers, [0.5, 1.0, 1.5])
    assert [row["score"] for row in rows] == [0.5, 1.0, 1.5]
    assert [row["response"] for row in rows] == [answer.text for answer in answers]
    assert all(answer.is_finished == (chat.end_id in answer.response_ids) for answer in answers)


def test_vllm_sleeps_while_the_policy_trains(base: Path, chat: Chat, tmp_path: Path) -> None:
    examples, _ = render([Demonstration("a", "x")], chat, 40, 8)
    config = make_config(base, "unused", tmp_path, generation=GenerationSettings(engine="vllm"))
    policy = load_policy(config.model)
    with vllm_installed():
        first, second = (draw_samples(policy, examples, chat, config) for _ in range(2))
        [llm] = FakeLLM.started
    assert [one.response_ids for one in first] == [one.response_ids for one in second]
    assert llm.calls.count("sleep") == 2
    assert llm.calls[-1] == "sleep"


@pytest.mark.parametrize(
    "options, message",
    [
        (["--choose_by", "reward_score"], "choose_by is reward_score and reward_model is None"),
        (["--reward_model", "rm"], "choose_by is held_out_loss and reward_model is rm"),
        (["--text_share", "1"], "text_share is 1"),
        (["--held_out", "0"], "held_out is 0"),
        (["--eval_every", "0"], "eval_every is 0"),
        (["--num_epoch", "3"], "num_epochs"),
    ],
)
def test_contradictory_settings_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(Config, ["--config", "configs/sft/tiny.yaml", *options])


def test_refuses_what_does_not_fit_and_leaves_no_folder(
    base: Path, demonstrations: Path, tmp_path: Path
) -> None:
    config = make_config(base, demonstrations, tmp_path, max_prompt_tokens=125)
    with pytest.raises(ValueError, match=r"125 .* max_response_tokens 8 .* 128 tokens"):
        train(config)
    assert not Path(config.output_dir).exists()
    with pytest.raises(ValueError, match="batch_size is 4, which 3 processes cannot share"):
        config.rows_per_pass(3)


@pytest.mark.parametrize("preset", sorted(Path("configs/sft").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_preset_runs_on_one_two_and_eight_processes(preset: Path) -> None:
    config = load_config(Config, ["--config", str(preset)])
    for num_processes in (1, 2, 8):
        rows = config.rows_per_pass(num_processes)
        assert 1 <= rows <= config.micro_batch_size
        assert config.batch_size % (rows * num_processes) == 0


def test_rows_of_a_pass_are_the_most_that_make_up_a_share() -> None:
    settings = ["--config", "configs/sft/tiny.yaml", "--batch_size", "12", "--micro_batch_size"]
    rows = [load_config(Config, [*settings, most]).rows_per_pass(2) for most in "1 4 5 99".split()]
    assert rows == [1, 3, 3, 6]


def test_vllm_in_several_processes_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the first process samples, while vLLM waits for all of them."""
    monkeypatch.setattr(train_module, "start_accelerator", lambda: SimpleNamespace(num_processes=2))
    config = Config(
        model=ModelSettings(path="nowhere"),
        demonstrations="nowhere.jsonl",
        generation=GenerationSettings(engine="vllm"),
        output_dir=str(tmp_path / "sft"),
    )
    with pytest.raises(ValueError, match=r"all 2 processes must start together, .*choose hf"):
        train(config)
    assert not (tmp_path / "sft").exists()
