"""Tests what evaluation does with a gold score's parts: figures, pairs and warnings."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.records import Prompt
from stages.evaluate.config import Config
from stages.evaluate.evaluate import evaluate
from stages.evaluate.measures import Answers, most_frequent_response
from stages.evaluate.pairs import ScoredResponse, outcomes_by_part, pair_figures
from stages.evaluate.parts import describe_parts, find_grader
from stages.evaluate.report import format_results, format_samples
from stages.evaluate.warnings import (
    Frequent,
    find_gain_by_length,
    find_one_answer,
    find_parts_traded,
    find_reward_disagreement,
    find_warnings,
)
from tests.rlhf.answers import of_text
from tests.stages.test_evaluate import (
    byte_tokenizer,
    save_random_policy,
    save_random_reward_model,
    write_rows,
)

JUDGE = """
class Gold:
    def __call__(self, prompts, responses):
        return [sum(parts.values()) for parts in self.parts(prompts, responses)]

    def parts(self, prompts, responses):
        return [{"correct": float("e" in text), "even": float(len(text) % 2 == 0)}
                for text in responses]

    def kinds(self, prompts):
        return ["question" if prompt.endswith("?") else "order" for prompt in prompts]

def make_gold():
    return Gold()

class Broken(Gold):
    def parts(self, prompts, responses):
        return [{"correct": "yes"} for _ in responses]

def make_broken():
    return Broken()

def shortness(prompts, responses, metas):
    return [-len(text) + meta.get("bonus", 0) for text, meta in zip(responses, metas)]
"""


def test_figures_of_parts_worked_by_hand() -> None:
    parts = [
        [{"correct": 1.0, "polite": 0.0}, {"correct": 0.5, "polite": 1.0}],
        [{"correct": 0.0}],  # a prompt that asks for no manners
        [{"polite": 1.0}],  # a prompt without a right answer
    ]
    found = describe_parts(parts, "correct", ["sum", "list", "sum"], seed=0)
    assert found["parts"] == {"correct": pytest.approx(1.5 / 3), "polite": pytest.approx(2 / 3)}
    assert found["right"] == pytest.approx(0.5)
    assert found["right_by_kind"] == {"list": 0.0, "sum": pytest.approx(0.75)}
    assert found["right_interval"] == (0.0, pytest.approx(0.75))
    assert describe_parts(parts, "true", None, seed=0).keys() == {"parts"}
    assert describe_parts(parts, None, ["a", "b", "c"], seed=0).keys() == {"parts"}


def scored(response: str, correct: float, polite: float, score: float) -> ScoredResponse:
    return ScoredResponse(response, {"correct": correct, "polite": polite}, score)


def test_pairs_that_differ_in_one_part_worked_by_hand() -> None:
    of_prompts = [
        [
            scored("It is two.", 1, 0, 0.5),
            scored("It is six.", 0, 0, 0.1),  # differs in correct only: the reward model is right
            scored("It is six.", 0, 0, 0.1),  # an equal response makes no more pairs
            scored("Gladly, six.", 0, 1, 0.1),  # differs from "It is six." in polite only: a tie
            scored("Gladly, ten.", 0, 1, 0.9),  # in polite only: right; in both parts: no pair
        ],
        [scored("Rex.", 1, 0, 0.2), scored("Tom.", 0, 0, 0.3)],  # wrong
        [
            scored("Yes.", 1, 0, 0.2),
            ScoredResponse("No.", {"correct": 0.0}, 0.3),
        ],  # other parts: no pair
        [],
    ]
    outcomes = outcomes_by_part(of_prompts)
    assert outcomes == {
        "correct": [[1.0], [0.0], [], []],
        "polite": [[0.5, 1.0], [], [], []],
    }
    found = pair_figures(outcomes, "correct", ["sum", "name", "name", "sum"], seed=0)
    assert found["right_pairs"] == 2
    assert found["right_accuracy"] == pytest.approx(0.5)
    low, high = found["right_accuracy_interval"]
    assert (low, high) == (0.0, 1.0)
    assert found["right_accuracy_by_kind"] == {"name": 0.0, "sum": 1.0}
    assert found["accuracy_by_part"] == {"correct": 0.5, "polite": pytest.approx(0.75)}
    assert found["pairs_by_part"] == {"correct": 2, "polite": 2}


def test_without_a_pair_there_is_no_accuracy() -> None:
    empty: dict[str, Any] = {"accuracy_by_part": {}, "pairs_by_part": {}}
    assert pair_figures({}, "correct", None, seed=0) == {"right_pairs": 0, **empty}
    assert pair_figures({}, None, None, seed=0) == empty


def test_the_most_frequent_response_counts_each_prompt_once() -> None:
    texts = [
        ("A?", ["yes", "yes", "no", "no"]),  # each answer counts half a prompt
        ("B?", ["no", "no", "no", "no"]),
        ("B?", ["maybe", "maybe", "maybe", "maybe"]),  # the same prompt asked again
        ("C?", ["yes"]),
    ]
    answers = [[of_text(Prompt(prompt), text) for text in group] for prompt, group in texts]
    found = most_frequent_response(Answers(answers, []))
    assert found == ("yes", pytest.approx(0.5))  # 1/2 + 0 + 1 of three prompts


def repeated(*values: float, times: int = 10) -> list[list[float]]:
    return [[value] for value in values] * times


def test_a_policy_that_trades_parts_is_told() -> None:
    parts = {
        "polite": {"sft": repeated(0, 0, 1), "ppo": repeated(1, 1, 1)},  # up by 2/3
        "correct": {"sft": repeated(1, 1, 0), "ppo": repeated(1, 0, 0)},  # down by 1/3
        "brief": {"sft": repeated(1, 0, 1), "ppo": repeated(0, 1, 1)},  # neither
    }
    (found,) = find_parts_traded("ppo", "sft", parts, seed=0)
    assert (found.code, found.policy) == ("EVAL_PARTS", "ppo")
    assert "gains by polite (+0.667, " in found.message
    assert "loses by correct (-0.333, " in found.message
    assert "brief" not in found.message
    assert find_parts_traded("sft", "sft", parts, seed=0) == []
    one_way = {name: parts[name] for name in ("polite", "brief")}
    assert find_parts_traded("ppo", "sft", one_way, seed=0) == []
    assert find_parts_traded("ppo", "sft", parts, seed=0, not_gains=["polite"]) == []


def test_too_few_prompts_warn_of_nothing() -> None:
    parts = {
        "polite": {"sft": repeated(0, times=19), "ppo": repeated(1, times=19)},
        "correct": {"sft": repeated(1, times=19), "ppo": repeated(0, times=19)},
    }
    assert find_parts_traded("ppo", "sft", parts, seed=0) == []
    enough = {
        name: {policy: [*of, of[0]] for policy, of in by_policy.items()}
        for name, by_policy in parts.items()
    }
    assert len(find_parts_traded("ppo", "sft", enough, seed=0)) == 1


def test_one_answer_to_many_prompts_is_told() -> None:
    def shares(sft: float, ppo: float) -> dict[str, Frequent]:
        return {"sft": Frequent("It is ten.", sft), "ppo": Frequent("Thank you.", ppo)}

    (found,) = find_one_answer("ppo", "sft", shares(0.02, 0.4), num_prompts=512)
    assert (found.code, found.policy) == ("EVAL_ONE_ANSWER", "ppo")
    assert "one answer to 40% of 512 different prompts: 'Thank you.'" in found.message
    assert "The most frequent answer of sft goes to 2%" in found.message
    assert find_one_answer("ppo", "sft", shares(0.02, 0.09), 512) == []  # too few prompts
    assert find_one_answer("ppo", "sft", shares(0.1, 0.24), 512) == []  # odds 1/9 -> 0.32
    assert len(find_one_answer("ppo", "sft", shares(0.1, 0.26), 512)) == 1  # odds 1/9 -> 0.35
    assert find_one_answer("ppo", "sft", shares(0.5, 0.7), 512) == []  # yes or no
    assert find_one_answer("ppo", "sft", shares(0.05, 1.0), 19) == []


@pytest.mark.parametrize(
    ("judge", "says"), [(repeated(1, 0, 0), "falls"), (repeated(0, 1, 1), "does not rise beyond")]
)
def test_a_reward_that_leaves_an_independent_judge_is_told(
    judge: list[list[float]], says: str
) -> None:
    reward = {"sft": repeated(0, 1, 2), "ppo": repeated(1, 2, 3)}
    judges = {
        "critic": {"sft": repeated(1, 1, 0), "ppo": judge},
        "friend": {"sft": repeated(0, 0, 0), "ppo": repeated(1, 0, 1)},
    }
    (found,) = find_reward_disagreement("ppo", "sft", reward, judges, seed=0)
    assert (found.code, found.policy) == ("EVAL_REWARD", "ppo")
    assert f"and critic {says}" in found.message
    level = {"sft": reward["sft"], "ppo": reward["sft"]}
    assert find_reward_disagreement("ppo", "sft", level, judges, seed=0) == []


def test_a_gain_that_shorter_responses_explain_is_told() -> None:
    """The judge gives a point more for each token less; the friend gives one point more."""
    lengths = {"sft": repeated(9, 8, 9), "ppo": repeated(4, 6, 8)}
    judge = {policy: [[-of[0]] for of in by_prompt] for policy, by_prompt in lengths.items()}
    friend = {"sft": judge["sft"], "ppo": [[of[0] + 1] for of in judge["ppo"]]}
    (found,) = find_gain_by_length(
        "ppo", "sft", {"judge": judge, "friend": friend}, lengths, seed=0
    )
    assert (found.code, found.policy) == ("EVAL_LENGTH", "ppo")
    assert "ppo gains +0.000, 95 % interval" in found.message.replace("-0.000", "+0.000")
    assert "by judge (+2.667, " in found.message and "friend" not in found.message
    assert "Its responses have 2.7 tokens less than those of sft" in found.message
    assert find_gain_by_length("ppo", "sft", {"friend": friend}, lengths, seed=0) == []
    worse = {"sft": judge["ppo"], "ppo": judge["sft"]}
    assert find_gain_by_length("ppo", "sft", {"worse": worse}, lengths, seed=0) == []


def test_all_checks_of_a_policy_that_pleases_the_reward_model_by_manners() -> None:
    """Gold rises as a whole, so only its parts and the right answers show the loss."""
    polite = {"sft": repeated(0, 0, 0), "ppo": repeated(3, 3, 3)}
    correct = {"sft": repeated(1, 1, 0), "ppo": repeated(1, 0, 0)}
    parts = {
        policy: [
            [{"polite": p[0], "correct": c[0]}]
            for p, c in zip(polite[policy], correct[policy], strict=True)
        ]
        for policy in ("sft", "ppo")
    }
    found = find_warnings(
        ["ppo"],
        "sft",
        scores={"gold": polite, "rm": polite, "length": correct},
        lengths={"sft": repeated(9, 8, 7), "ppo": repeated(9, 6, 7)},
        parts=parts,
        right_part="correct",
        frequent={"sft": Frequent("a", 0.02), "ppo": Frequent("b", 0.9)},
        num_prompts=30,
        seed=0,
    )
    assert [one.code for one in found] == [
        "EVAL_PARTS",
        "EVAL_ONE_ANSWER",
        "EVAL_REWARD",
        "EVAL_REWARD",
    ]
    assert "length falls" in found[2].message
    assert "gold's part correct falls" in found[3].message


def sample_row(number: int, policy: str, response: str, prompt: Any = "Who?") -> dict[str, Any]:
    return {
        "prompt_number": number,
        "prompt": prompt,
        "policy": policy,
        "response": response,
        "finished": number != 1,
    }


def test_samples_begin_with_warnings_and_a_table_to_paste() -> None:
    turns = [
        {"role": "user", "content": "Name Anna's home."},
        {"role": "assistant", "content": "Oakby."},
        {"role": "user", "content": "And her pet?"},
    ]
    rows = [
        sample_row(0, "sft", "A | B", turns),
        sample_row(0, "sft", "a second sample"),
        sample_row(0, "ppo", "<b>*ten*</b>\nline two", turns),
        sample_row(1, "sft", "cut off"),
        sample_row(1, "ppo", ""),
    ]
    warnings = [{"code": "EVAL_PARTS", "policy": "ppo", "message": "ppo gains by *polite*"}]
    text = format_samples(rows, warnings, num_shown=1)
    assert text.splitlines()[:8] == [
        "# Samples on held-out prompts",
        "",
        r"- **EVAL_PARTS**: ppo gains by \*polite\*",
        "",
        "| prompt | sft | ppo |",
        "| --- | --- | --- |",
        "| user: Name Anna's home.<br>assistant: Oakby.<br>user: And her pet? "
        r"| A \| B | &lt;b>\*ten\*&lt;/b><br>line two |",
        "| Who? | cut off (cut) | (nothing) (cut) |",
    ]
    assert text.count("\n## Prompt") == 1
    assert "a second sample" in text


def test_the_table_has_ten_prompts_at_most() -> None:
    rows = [sample_row(number, "sft", f"answer {number}") for number in range(12)]
    text = format_samples(rows, [], num_shown=0)
    assert "answer 9" in text and "answer 10" not in text


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    folder = tmp_path_factory.mktemp("inputs")
    for name, seed in {"base": 2, "sft": 0, "ppo": 1}.items():
        save_random_policy(folder / name, seed, byte_tokenizer("<end>", "<pad>"))
    save_random_reward_model(folder / "rm", folder / "sft")
    (folder / "judge_of_parts_test.py").write_text(JUDGE)
    prompts = [{"prompt": f"{n}?" if n % 3 else f"{n}!", "meta": {"bonus": n}} for n in range(24)]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield Config(
            policies={name: str(folder / name) for name in ("base", "sft", "ppo")},
            baseline="sft",
            prompts=write_rows(folder / "prompts.jsonl", prompts),
            max_prompt_tokens=60,
            max_new_tokens=6,
            generation=GenerationSettings(batch_size=48),
            micro_batch_tokens=400,
            pair_samples_per_prompt=4,
            reward_model=str(folder / "rm"),
            gold="judge_of_parts_test:make_gold",
            judges={"short": "judge_of_parts_test:shortness", "second": str(folder / "rm")},
            best_of=2,
            output_dir=str(folder / "run"),
        )
    sys.modules.pop("judge_of_parts_test", None)


@pytest.fixture(scope="module")
def results(inputs: Config) -> dict[str, Any]:
    evaluate(inputs)
    return json.loads((Path(inputs.output_dir) / "results.json").read_text(encoding="utf-8"))


def test_a_run_measures_what_is_right(inputs: Config, results: dict[str, Any]) -> None:
    rows = [json.loads(line) for line in (Path(inputs.output_dir) / "samples.jsonl").open()]
    for name in inputs.policies:
        own = [row for row in rows if row["policy"] == name]
        right = [float("e" in row["response"]) for row in own]
        assert [row["parts"]["correct"] for row in own] == right
        found = results[name]
        assert found["right"] == found["parts"]["correct"] == pytest.approx(sum(right) / 24)
        orders = sum(right[n] for n in range(0, 24, 3)) / 8
        assert found["right_by_kind"]["order"] == pytest.approx(orders)
        assert 0 <= found["right_greedy"] <= 1
        assert found["most_frequent_response"]["share"] >= 1 / 24
        score = sum(n - len(row["response"]) for n, row in enumerate(own)) / 24
        assert found["short_score"] == pytest.approx(score, abs=1e-6)
        assert found["second_score"] == found["rm_score"]
    assert results["ppo"]["win_rate_vs_sft_by_second"] == results["ppo"]["win_rate_vs_sft_by_rm"]


def test_a_run_tries_the_reward_model_on_pairs(results: dict[str, Any]) -> None:
    found = results["rm"]
    assert found["right_pairs"] == found["pairs_by_part"]["correct"] > 0
    assert found["right_accuracy"] == found["accuracy_by_part"]["correct"]
    low, high = found["right_accuracy_interval"]
    assert low <= found["right_accuracy"] <= high
    assert found["pairs_by_part"].keys() == found["accuracy_by_part"].keys() == {"correct", "even"}


def test_a_run_measures_best_of_n_on_the_responses_of_the_pairs(results: dict[str, Any]) -> None:
    about, found = results["best_of"], results["best_of_2"]
    assert (about["policy"], about["judge"], about["samples_per_prompt"]) == ("sft", "rm", 4)
    curve = about["by_n"]
    assert list(curve) == ["1", "2"]
    assert curve["2"]["rm_score"] == found["rm_score"] == pytest.approx(found["second_score"])
    assert curve["2"]["rm_score"] > curve["1"]["rm_score"]
    assert found["win_rate_vs_sft_by_rm"] > 0.5
    assert found["right_by_kind"].keys() == results["sft"]["right_by_kind"].keys()
    low, high = found["right_gain_vs_sft_interval"]
    assert low <= found["right_gain_vs_sft"] <= high


def test_a_run_measures_gains_on_the_baseline(results: dict[str, Any]) -> None:
    for name in ("base", "ppo"):
        gains = {"right": results[name]["right"] - results["sft"]["right"]}
        for judge in ("gold", "rm", "short"):
            gains[judge] = results[name][f"{judge}_score"] - results["sft"][f"{judge}_score"]
        for what, difference in gains.items():
            assert results[name][f"{what}_gain_vs_sft"] == pytest.approx(difference, abs=1e-6)
    assert not any("_gain_vs_" in key for key in results["sft"])


def test_the_table_shows_parts_and_pairs(results: dict[str, Any]) -> None:
    lines = format_results(results).splitlines()
    assert any(line.startswith("right responses ") for line in lines)
    assert any(line.startswith("right: order ") for line in lines)
    assert any(line.startswith("part of gold: even ") for line in lines)
    assert any(line.startswith("short score ") for line in lines)
    pairs = next(line for line in lines if line.startswith("right pairs "))
    assert pairs.split()[-1] == str(results["rm"]["right_pairs"])
    assert any(line.startswith("accuracy where only this part differs: even") for line in lines)


def test_no_pairs_without_samples_for_them(inputs: Config, tmp_path: Path) -> None:
    config = replace(
        inputs,
        policies={"sft": inputs.policies["sft"]},
        pair_samples_per_prompt=0,
        judges={},
        right_part=None,
        best_of=None,
        output_dir=str(tmp_path),
    )
    evaluate(config)
    found = json.loads((tmp_path / "results.json").read_text())
    assert "rm" not in found
    assert "right" not in found["sft"] and found["sft"]["parts"].keys() == {"correct", "even"}


def test_parts_that_are_no_numbers_are_told(inputs: Config, tmp_path: Path) -> None:
    broken = replace(
        inputs, gold="judge_of_parts_test:make_broken", output_dir=str(tmp_path / "run")
    )
    with pytest.raises(
        ValueError, match=r"make_broken \(parts\) gave \{'correct': 'yes'\} for row 0"
    ):
        evaluate(broken)
    assert not (tmp_path / "run").exists()


def test_a_gold_that_is_a_mere_function_has_no_parts() -> None:
    assert find_grader(lambda prompts, responses: [0.0], "a:b") is None
    assert find_grader(None, "gold") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"pair_samples_per_prompt": 1}, "pair_samples_per_prompt is 1, and a pair"),
        (
            lambda c: {"pair_samples_per_prompt": -1},
            "pair_samples_per_prompt is -1; give",
        ),
        (lambda c: {"judges": {"gold": "a:b"}}, "judges has the name 'gold'"),
        (lambda c: {"judges": {"parts": "a:b"}}, "judges has the name 'parts'"),
        (lambda c: {"policies": {**c.policies, "rm": "x"}}, "policies has the name 'rm'"),
        (lambda c: {"stages": {"total": "x"}}, "stages has the name 'total'"),
    ],
)
def test_settings_that_cannot_be(
    inputs: Config, change: Callable[[Config], dict[str, Any]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(inputs, **change(inputs))


def test_a_judge_that_is_not_there_is_told(inputs: Config, tmp_path: Path) -> None:
    for judge, message in [
        (str(tmp_path / "none" / "rm"), "does not exist"),
        ("judge_of_parts_test:nothing", "has no function 'nothing'"),
    ]:
        config = replace(inputs, judges={"second": judge}, output_dir=str(tmp_path / "run"))
        with pytest.raises((ValueError, OSError), match=message):
            evaluate(config)
