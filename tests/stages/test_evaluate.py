"""Tests the evaluate stage on random models of a few thousand weights and real files."""

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.generation.answers import Answer
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.inputs.packing import Packer, PromptTree
from rlhf.models.loading import load_policy, load_scalar, new_policy
from rlhf.models.passes import compute_scores
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.models.tokenizers import load_tokenizer
from rlhf.rewards.models import GoldenRow, RewardCard, load_reward_model
from rlhf.rewards.rendering import rendering_hash
from rlhf.rewards.scores import Scored
from rlhf.runs import stopwatch
from stages.evaluate.config import Config
from stages.evaluate.evaluate import evaluate
from stages.evaluate.measures import Answers, describe, estimate_kl, score, score_all
from stages.evaluate.report import format_results, format_samples
from tests.rlhf.answers import finished as finished_answer
from tests.rlhf.answers import of_ids

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 96,
    "initializer_range": 0.3,
}
PROMPTS = ["Who?", "What is it?", "Why so?", "Say no.", "Count: 1 2", "And now?", "Go.", "Hm?"]

JUDGE = """
def make_judge(path):
    weight = float(open(path).read())
    return lambda prompts, responses: [weight * len(set(text)) for text in responses]

def make_broken_judge():
    return lambda prompts, responses: [1.0]
"""


def byte_tokenizer(*special: str) -> PreTrainedTokenizerBase:
    """Make a tokenizer of bytes after the special tokens, the first of which ends responses."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], pad_token=special[1]
    )


def save_random_policy(folder: Path, seed: int, tokenizer: PreTrainedTokenizerBase) -> None:
    torch.manual_seed(seed)
    Chat(tokenizer)
    save_policy(new_policy(ARCHITECTURE, tokenizer), tokenizer, folder)


def save_random_reward_model(folder: Path, policy: Path) -> None:
    torch.manual_seed(5)
    tokenizer = load_tokenizer(str(policy))
    model = load_scalar(ModelSettings(path=str(policy)), new_head=True)
    model.save(folder, tokenizer)
    model.bias = 0.25
    chat = Chat(tokenizer)
    tree = PromptTree(tuple(chat.prompt_ids("Who?")), (tuple(chat.response_ids("I.")),))
    first = compute_scores(model, [tree], Packer(99)).item()
    golden = GoldenRow(prompt="Who?", response="I.", score=first)
    RewardCard(
        bias=model.bias,
        scale=1.0,
        pair_accuracy=0.8,
        interval=(0.7, 0.9),
        golden=(golden,),
        template_hash=chat.template_hash,
        rendering_hash=rendering_hash(chat),
    ).save(folder)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Write policies (sft, its twin, and another), a reward model, a gold score, texts, probes."""
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in {"sft": 0, "twin": 0, "other": 1}.items():
        save_random_policy(folder / name, seed, byte_tokenizer("<end>", "<pad>"))
    save_random_reward_model(folder / "rm", folder / "sft")
    (folder / "rm" / "results.json").write_text(
        '{"pair_accuracy": 0.8125, "pair_accuracy_interval": [0.75, 0.875], "seconds": 7.5, '
        '"tokens_per_second": 120.5, "phase_seconds": {"train": 4.0, "update": 5.0}}'
    )
    write_rows(folder / "rm" / "metrics.jsonl", [{"step": s, "rm/loss": 0.7 - s} for s in range(3)])
    (folder / "weight").write_text("2.0")
    (folder / "judge_of_evaluate_test.py").write_text(JUDGE)
    probe = {"prompt": "A", "meta": {"text": "A is", "answer": "x"}}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield Config(
            policies={name: str(folder / name) for name in ("sft", "twin", "other")},
            prompts=write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in PROMPTS]),
            samples_per_prompt=2,
            max_prompt_tokens=60,
            max_new_tokens=8,
            max_text_tokens=20,
            generation=GenerationSettings(batch_size=5),
            micro_batch_tokens=200,
            reward_model=str(folder / "rm"),
            gold="judge_of_evaluate_test:make_judge",
            gold_path=str(folder / "weight"),
            held_out_text=write_rows(
                folder / "text.jsonl",
                [{"text": "The oak is old."}, {"text": "A"}, {"text": "Ice " * 9}],
            ),
            fact_probe=write_rows(folder / "probe.jsonl", [probe]),
            reports={"rm": str(folder / "rm")},
            stages={"rm": str(folder / "rm"), "ppo": str(folder / "nowhere")},
            num_shown=3,
            output_dir=str(folder / "run"),
        )
    sys.modules.pop("judge_of_evaluate_test", None)


@dataclass(frozen=True)
class Finished:
    config: Config
    results: dict[str, Any]
    printed: str

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def read_results(config: Config) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(inputs: Config) -> Finished:
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        evaluate(inputs)
    return Finished(inputs, read_results(inputs), "\n".join(lines))


def test_equal_policies_tie_and_have_no_kl(finished: Finished) -> None:
    twin = finished.results["twin"]
    assert twin["win_rate_vs_sft"] == twin["win_rate_vs_sft_by_rm"] == 0.5
    for name in ("kl", "kl_error", "kl_k3"):
        assert twin[name] == pytest.approx(0.0, abs=1e-5)
    assert twin["gold_gain_vs_sft"] == twin["rm_gain_vs_sft"] == 0.0
    assert twin["rm_gain_at_equal_length_vs_sft_interval"] == [0.0, 0.0]
    compared = ("kl", "win_rate", "gold_gain", "rm_gain")
    own = {key: value for key, value in twin.items() if not key.startswith(compared)}
    baseline = finished.results["sft"]
    assert own.keys() == baseline.keys()
    for name, value in own.items():
        assert value == pytest.approx(baseline[name], abs=1e-5), name


def test_another_policy_has_a_kl_that_both_estimates_see(finished: Finished) -> None:
    other = finished.results["other"]
    assert other["kl"] > 3 * other["kl_error"] > 0
    assert other["kl_k3"] > 1
    assert other["win_rate_vs_sft_interval"][0] < other["win_rate_vs_sft_interval"][1]


def test_scores_and_win_rate_are_those_of_the_samples(finished: Finished) -> None:
    rows = [row for row in finished.rows if row["policy"] == "other"]
    assert all(row["gold"] == 2 * len(set(row["response"])) for row in finished.rows)
    assert finished.results["other"]["gold_score"] == pytest.approx(
        sum(row["gold"] for row in rows) / 16, abs=1e-9
    )
    by_prompt = [
        [
            (theirs["gold"] > ours["gold"]) + (theirs["gold"] == ours["gold"]) / 2
            for theirs in rows
            for ours in finished.rows
            if ours["policy"] == "sft" and ours["prompt"] == theirs["prompt"] == prompt
        ]
        for prompt in PROMPTS
    ]
    assert [len(outcomes) for outcomes in by_prompt] == [4] * 8
    expected = sum(map(sum, by_prompt)) / 32
    assert finished.results["other"]["win_rate_vs_sft"] == pytest.approx(expected, abs=1e-9)
    assert finished.results["judge"] == "gold"


def test_scores_come_back_to_their_prompts(inputs: Config) -> None:
    assert inputs.reward_model is not None
    reward = load_reward_model(ModelSettings(path=inputs.reward_model), micro_batch_tokens=99)
    chat = reward.chat
    texts = [["I.", "It is you."], ["So."]]
    answers = [
        [finished_answer(chat, prompt, text) for text in group]
        for prompt, group in zip(["Who?", "Why so?"], texts, strict=True)
    ]
    found = score(reward, Answers(answers, []))
    assert [len(group) for group in found] == [2, 1]
    for group, values in zip(answers, found, strict=True):
        for answer, value in zip(group, values, strict=True):
            alone = reward.scores([answer.prompt_ids], [answer.response_ids]).item()
            assert value == pytest.approx(alone, abs=1e-5)


def test_judges_say_how_far_they_are_where_bars_are_hidden(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(stopwatch, "HEARTBEAT_SECONDS", 0.0)

    class ScoresIndex:
        def score(self, answers: Sequence[Answer]) -> Scored:
            return Scored(torch.arange(len(answers)).float())

    one, two = (Answers([[of_ids([1], [2])] * size], []) for size in (1, 2))
    scores = score_all({"a": ScoresIndex(), "b": ScoresIndex()}, {"sft": one, "ppo": two})
    of_policies = {"sft": [[0.0]], "ppo": [[0.0, 1.0]]}
    assert scores == {"a": of_policies, "b": of_policies}
    told = capsys.readouterr().out.splitlines()
    counts = ("1 of 6", "3 of 6", "4 of 6", "6 of 6")
    assert told == [f"evaluate: judges score {count} after 0 s" for count in counts]


def test_text_loss_is_the_models_own_loss(finished: Finished) -> None:
    policy = load_policy(ModelSettings(path=finished.config.policies["other"]))
    tokenizer = load_tokenizer(finished.config.policies["other"])
    nats = tokens = 0.0
    for text in ("The oak is old.", ("Ice " * 9)[:20]):  # a byte is a token; "A" predicts none
        ids = torch.tensor([tokenizer(text).input_ids])
        nats += policy(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert finished.results["other"]["text_loss"] == pytest.approx(nats / tokens, abs=1e-5)


def test_results_have_the_reports_and_the_seconds_of_all_stages(finished: Finished) -> None:
    results = finished.results
    speed = {"tokens_per_second": 120.5, "phase_seconds": {"train": 4.0, "update": 5.0}}
    accuracy = {"pair_accuracy": 0.8125, "pair_accuracy_interval": [0.75, 0.875]}
    assert results["rm"] == accuracy | speed
    seconds = results["seconds"]
    assert list(seconds) == ["rm", "evaluate", "total"]
    assert seconds["rm"] == 7.5
    assert seconds["total"] == pytest.approx(7.5 + seconds["evaluate"], abs=0.06)
    assert results["speed"] == {"rm": speed}
    assert results["prompts"]["used"] == 8
    assert 0.0 <= results["sft"]["fact_recall"] <= 1.0
    assert "no stage ppo at" in finished.printed


def test_table_shows_every_policy_in_a_column(finished: Finished) -> None:
    lines = finished.printed.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Results on 8 held-out"))
    assert "2 responses each at temperature 1" in lines[start]
    assert lines[start + 1].split() == ["sft", "twin", "other"]
    win_rates = next(line for line in lines if line.startswith("win rate against sft, by gold"))
    other = finished.results["other"]["win_rate_vs_sft"]
    assert win_rates.split()[-3:] == ["-", "0.500", f"{other:.3f}"]
    table = lines[start - 1 :]
    assert any(line.split() == ["pair", "accuracy", "0.812"] for line in table)
    assert any(line.split()[-1] == "0.750..0.875" for line in table if line)
    assert max(map(len, table)) <= 100


def test_table_shows_where_the_time_of_a_stage_went() -> None:
    report = {"phase_seconds": {"rollout": 2.0, "train": 5.5, "update": 10.0}}
    results: dict[str, Any] = {
        "policies": [],
        "baseline": "sft",
        "judge": None,
        "judges": [],
        "prompts": {"used": 2, "samples_per_prompt": 1, "temperature": 1.0},
        "speed": {"ppo": report},
        "seconds": {"ppo": 12.0},
    }
    lines = [line.split() for line in format_results(results).splitlines()]
    start = lines.index(["Speed:", "ppo"])
    assert lines[start + 2 : start + 4] == [
        ["time:", "train", "5.5", "s,", "55%"],
        ["time:", "rollout", "2.0", "s,", "20%"],
    ]


def test_samples_stand_side_by_side(finished: Finished) -> None:
    text = (finished.folder / "samples.md").read_text(encoding="utf-8")
    assert text.count("\n## Prompt") == 3
    assert text.count("**other** (gold ") == 3 * 2
    assert len(finished.rows) == 8 * 2 * 3
    assert [row["policy"] for row in finished.rows[:6:2]] == ["sft", "twin", "other"]


def test_a_page_is_written_too(finished: Finished) -> None:
    page = (finished.folder / "report.html").read_text(encoding="utf-8")
    assert "other is " in page


def test_the_same_seed_gives_the_same_results(finished: Finished, tmp_path: Path) -> None:
    # The order of the policies does not matter either; only their seeds and weights do.
    policies = {name: finished.config.policies[name] for name in ("other", "sft")}
    again = replace(
        finished.config, policies=policies, baseline="sft", output_dir=str(tmp_path / "again")
    )
    evaluate(again)
    assert read_results(again)["other"] == finished.results["other"]
    other_seed = replace(again, seed=1, output_dir=str(tmp_path / "other_seed"))
    evaluate(other_seed)
    assert read_results(other_seed)["other"]["kl"] != finished.results["other"]["kl"]


def test_without_gold_the_reward_model_judges(inputs: Config, tmp_path: Path) -> None:
    config = replace(inputs, gold=None, gold_path=None, output_dir=str(tmp_path / "run"))
    evaluate(config)
    results = read_results(config)
    assert results["judge"] == "rm"
    assert results["twin"]["win_rate_vs_sft"] == 0.5
    assert "gold_score" not in results["sft"]
    assert "win rate against sft, by reward model" in format_results(results)


def test_one_policy_and_no_judge_is_enough(inputs: Config, tmp_path: Path) -> None:
    config = Config(
        policies={"sft": inputs.policies["sft"]},
        prompts=inputs.prompts,
        num_prompts=3,
        max_prompt_tokens=60,
        max_new_tokens=4,
        output_dir=str(tmp_path / "run"),
    )
    evaluate(config)
    results = read_results(config)
    only_responses = {"response_tokens", "eos_rate", "distinct_2", "most_frequent_response"}
    assert set(results["sft"]) == only_responses
    assert results["warnings"] == []
    assert results["judge"] is None
    assert results["prompts"]["used"] == 3
    assert "eos rate" in format_results(results)


def test_prompts_that_do_not_fit_are_counted(
    inputs: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [
        {"role": "user", "content": "x" * 50},
        {"role": "assistant", "content": "y"},
        {"role": "user", "content": "Hm?"},
    ]
    rows: list[dict[str, Any]] = [{"prompt": "Who?"}, {"prompt": turns}, {"prompt": "z" * 50}]
    config = Config(
        policies={"sft": inputs.policies["sft"]},
        prompts=write_rows(tmp_path / "prompts.jsonl", rows),
        max_prompt_tokens=40,
        max_dropped=0.5,
        max_new_tokens=4,
        output_dir=str(tmp_path / "run"),
    )
    evaluate(config)
    prompts = read_results(config)["prompts"]
    assert (prompts["used"], prompts["cut"], prompts["dropped"]) == (2, 1, 1)
    assert "1 lost early turns and 1 were dropped" in capsys.readouterr().out
    with pytest.raises(ValueError, match="3 of 3 prompts are over max_prompt_tokens 5"):
        evaluate(replace(config, max_prompt_tokens=5, overwrite=True))


def test_divergence_worked_by_hand() -> None:
    # Log-ratios: prompt 1 has responses (1, -0.5) and (0.5); prompt 2 has (-1).
    answers = [[of_ids([1], [2, 3]), of_ids([1], [4])], [of_ids([1], [5])]]
    logprobs = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5]), torch.tensor([-3.0])]
    references = [torch.tensor([-2.0, -1.5]), torch.tensor([-1.0]), torch.tensor([-2.0])]
    found = estimate_kl(Answers(answers, logprobs), references)
    assert found["kl"] == pytest.approx((0.5 + -1.0) / 2, abs=1e-6)
    assert found["kl_error"] == pytest.approx(1.5 / 2, abs=1e-6)
    tokens = [math.exp(-1) - 1 + 1, math.exp(0.5) - 1 - 0.5, math.exp(-0.5) - 0.5, math.e - 2]
    assert found["kl_k3"] == pytest.approx(sum(tokens) / 3, abs=1e-5)


def test_what_responses_show_worked_by_hand() -> None:
    ended = [of_ids([9], ids, is_finished=True) for ids in ([1, 0], [0])]
    answers = [[of_ids([9], [1, 2, 1, 2]), ended[0]], [ended[1]]]
    found = describe(Answers(answers, []))
    assert found["response_tokens"] == pytest.approx(7 / 3, abs=1e-12)
    assert found["eos_rate"] == pytest.approx(2 / 3, abs=1e-12)
    assert found["distinct_2"] == pytest.approx(3 / 4, abs=1e-12)  # bigrams 12, 21, 12, 10


def test_samples_keep_their_text_whatever_is_in_it() -> None:
    row = {
        "prompt_number": 0,
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "policy": "sft",
        "response": "```\ncode\n```",
        "finished": False,
        "rm": -1.234,
    }
    text = format_samples([row], [], num_shown=1)
    assert "system: Be brief.\nuser: Hi" in text
    assert "**sft** (reward model -1.23, cut before its end)" in text
    assert "````text\n```\ncode\n```\n````" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"policies": {}}, "policies is empty"),
        (lambda c: {"baseline": "base"}, "baseline is 'base'; give one of the policies sft, twin"),
        (lambda c: {"policies": {"judge": "x"}}, "policies has the name 'judge'"),
        (lambda c: {"policies": {"a.b": "x"}}, "policies has the name 'a.b'"),
        (lambda c: {"reports": {"sft": "x"}}, "policies and reports both have the name 'sft'"),
        (lambda c: {"temperature": 0.0}, "temperature is 0.0"),
        (lambda c: {"num_prompts": 1}, "num_prompts is 1; give a number: 2 or more"),
        (lambda c: {"gold": None}, "gold is null"),
    ],
)
def test_settings_that_cannot_be(
    inputs: Config, change: Callable[[Config], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(inputs, **change(inputs))


def test_inputs_that_cannot_be_leave_the_last_run_alone(finished: Finished, tmp_path: Path) -> None:
    config = finished.config
    before = (finished.folder / "results.json").read_bytes()
    stranger = tmp_path / "stranger"
    save_random_policy(stranger, 0, byte_tokenizer("<stop>", "<pad>"))
    (tmp_path / "rm").mkdir()
    broken = "judge_of_evaluate_test:make_broken_judge"
    changes: list[tuple[dict[str, Any], str]] = [
        (
            {"policies": {**config.policies, "stranger": str(stranger)}},
            "policy stranger at .* another",
        ),
        ({"max_new_tokens": 90}, "is 150, but policy .* reads 96 tokens at most"),
        ({"reports": {"rm": str(tmp_path / "rm")}}, "has no results.json"),
        ({"gold": broken, "gold_path": None}, "returned 1 entries for 16"),
        ({"reward_model": config.policies["sft"]}, "no reward head"),
        ({"prompts": str(tmp_path / "none.jsonl")}, "does not exist"),
    ]
    for change, message in changes:
        with pytest.raises((ValueError, OSError), match=message):
            evaluate(replace(config, **change, overwrite=True))
        assert (finished.folder / "results.json").read_bytes() == before
