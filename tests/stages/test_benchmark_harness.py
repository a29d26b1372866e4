"""Tests the benchmark stage with lm-evaluation-harness: it agrees with HFLM, and works offline.

The policies are random models of a few thousand weights; the tasks are files like those in
configs/benchmark/tasks.
"""

import functools
import json
import re
import socket
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.generation.hf import LoopEngine
from rlhf.generation.settings import GenerationSettings
from rlhf.inputs.chat import Chat
from rlhf.models.saving import save_policy
from rlhf.runs.program import USER_ERROR, run_stage
from stages.benchmark.benchmark import benchmark
from stages.benchmark.config import Config, Rendering, TaskSettings
from tests.rlhf.tiny_models import byte_tokenizer, change_trained, tiny_policy_of

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
from lm_eval.tasks import TaskManager

import rlhf.runs.stopwatch
import stages.benchmark.task_names
import stages.benchmark.tasks
from stages.benchmark.task_files import read_task_file
from stages.benchmark.task_names import check_names
from stages.benchmark.tasks import hold_out

CONTEXT = 64
"""Positions of the tiny models. Some prompts with examples are longer, and lose their start."""
MEANS = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc",)]
PLAIN: list[Rendering] = ["plain"]
BOTH: list[Rendering] = ["plain", "chat"]
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}\n",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [*MEANS, {**MEANS[0], "metric": "acc_norm"}],
}
CLOZE = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{query}}",
    "doc_to_target": " {{choices[gold]}}",
    "metric_list": [
        *MEANS,
        {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    ],
}
TEXT = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{query * 3}}",
    "metric_list": [
        {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}
    ],
}
SUMS: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{query}}=",
    "doc_to_target": "{{gold}}",
    "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12},
    "filter_list": [
        {
            "name": "digit",
            "filter": [
                {"function": "regex", "regex_pattern": "([a-m])"},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
ROWS: list[dict[str, Any]] = [
    {
        "query": f"what is {'so ' * (i % 4)}{i}",
        "choices": ["yes", f"no {i}", "a", "it is", "y"][: 2 + i % 4],
        "gold": i % 2,
    }
    for i in range(14)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two policies, one of them without a chat template, data, and task files."""
    folder = tmp_path_factory.mktemp("benchmark")
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    Chat(tokenizer)
    for name, architecture in (("first", "llama"), ("second", "gpt2")):
        size = "n_positions" if architecture == "gpt2" else "max_position_embeddings"
        sizes: dict[str, Any] = {"vocab_size": len(tokenizer), size: CONTEXT}
        policy = tiny_policy_of(architecture, **sizes)
        change_trained(policy)
        save_policy(policy, tokenizer, folder / name)
    save_policy(policy, tokenizer, folder / "untaught")
    (folder / "untaught" / "chat_template.jinja").unlink()
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / "others.jsonl", [{**row, "query": row["query"] + "?"} for row in ROWS])
    for name, settings in (("mc", CHOICES), ("cloze", CLOZE), ("text", TEXT), ("sums", SUMS)):
        write_task(folder, name, settings)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_task(folder: Path, name: str, settings: dict[str, Any], **changes: Any) -> None:
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
        "test_split": "test",
        **settings,
        **changes,
    }
    text = yaml.safe_dump({key: value for key, value in task.items() if value is not None})
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def make_config(folder: Path, output_dir: Path, **changes: Any) -> Config:
    settings = {
        "policies": {"first": str(folder / "first"), "second": str(folder / "second")},
        "tasks": {"mc": TaskSettings()},
        "task_dir": str(folder),
        "data_dir": str(folder),
        "num_shot_questions": 4,
        "generation": GenerationSettings(batch_size=4),
        "micro_batch_tokens": 128,
        "output_dir": str(output_dir),
    }
    return Config(**{**settings, **changes})


def run(config: Config) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run the benchmark; return its results and samples."""
    benchmark(config)
    output = Path(config.output_dir)
    lines = (output / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return results, [json.loads(line) for line in lines]


TASKS = {
    "mc": TaskSettings(shots=[0, 3], renderings=BOTH),
    "cloze": TaskSettings(shots=[0, 1], renderings=BOTH, draws=2),
    "text": TaskSettings(renderings=PLAIN),
    "sums": TaskSettings(shots=[0, 1], renderings=BOTH),
}


@pytest.fixture(scope="module")
def both_engines(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Run the same tasks by our passes, without a network, and by HFLM."""
    output = tmp_path_factory.mktemp("engines")
    found = {"hflm": run(make_config(folder, output / "hflm", tasks=TASKS, engine="hflm"))}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse_connection)
        found["packed"] = run(make_config(folder, output / "packed", tasks=TASKS))
    return found


def refuse_connection(*_: Any) -> None:
    raise AssertionError("the benchmark asked for a network")


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return all texts and numbers in nested lists and mappings by their path."""
    if isinstance(value, dict):
        value = list(value.items())
    elif isinstance(value, list):
        value = list(enumerate(value))
    else:
        return {path: value}
    return {at: leaf for key, one in value for at, leaf in leaves(one, f"{path}/{key}").items()}


def assert_equal_leaves(found: Any, expected: Any, **tolerance: Any) -> None:
    """Check that numbers differ by the tolerance at most, and that all else is equal."""
    ours, theirs = leaves(found), leaves(expected)
    assert ours.keys() == theirs.keys()
    is_number = {path: isinstance(leaf, int | float) for path, leaf in theirs.items()}
    for paths, compare in (
        ([path for path in theirs if is_number[path]], lambda all: pytest.approx(all, **tolerance)),
        ([path for path in theirs if not is_number[path]], lambda all: all),
    ):
        assert [ours[path] for path in paths] == compare([theirs[path] for path in paths])


def test_every_request_agrees_with_the_harness_own_model(both_engines: dict[str, Any]) -> None:
    (_, ours), (_, theirs) = both_engines["packed"], both_engines["hflm"]
    # Four rows are examples. There are two renderings of two numbers of shots; cloze draws twice.
    assert len(ours) == 2 * (10 * 4 + 10 * 6 + 14 + 10 * 4)
    assert_equal_leaves(ours, theirs, rel=0, abs=1e-4)
    assert len({row["responses"][0] for row in ours if row["task"] == "sums"}) > 10


def test_every_figure_agrees_with_the_harness_own_model(both_engines: dict[str, Any]) -> None:
    (ours, _), (theirs, _) = both_engines["packed"], both_engines["hflm"]
    assert len(ours["figures"]) == 2 * (2 * 4 + 2 * 4 + 1 + 4)
    assert len(ours["tax"]) == len(ours["figures"]) / 2
    for section in ("figures", "tax", "tasks"):
        # A relative error of a perplexity is an error in nats, and requests differ by up to 1e-4.
        assert_equal_leaves(ours[section], theirs[section], rel=1e-4, abs=1e-3)
    assert {row["verdict"] for row in ours["tax"]} > {""}


def test_a_prompt_has_its_examples_and_not_its_question_twice(both_engines: dict[str, Any]) -> None:
    _, rows = both_engines["packed"]
    prompts = [row for row in rows if row["task"] == "mc" and "prompt" in row]
    assert {(row["shots"], row["prompt"].count("what is")) for row in prompts} == {(0, 1), (3, 4)}
    for row in prompts:
        questions = re.findall(r"what is (?:so )*\d+", row["prompt"])
        assert len({*questions}) == len(questions)


def test_it_says_how_far_it_is_where_bars_are_hidden_and_gives_up_its_engine(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(rlhf.runs.stopwatch, "HEARTBEAT_SECONDS", 0.0)
    released: list[LoopEngine] = []
    monkeypatch.setattr(LoopEngine, "release", lambda engine: released.append(engine))
    tasks = {name: TaskSettings(renderings=PLAIN) for name in ("cloze", "sums")}
    config = make_config(folder, tmp_path / "out", tasks=tasks)
    run(config)
    told = capsys.readouterr().out.splitlines()
    for what in ("choices", "answers"):
        assert told.count(f"benchmark: {what} 14 of 14 after 0 s") == len(config.policies)
    assert len(released) == len(config.policies)


def test_samples_repeat_with_their_seed_and_vote_as_counted(folder: Path, tmp_path: Path) -> None:
    tasks = {"sums": TaskSettings(samples=5, renderings=PLAIN, temperature=1.0)}
    policies = {"first": str(folder / "first")}
    results, rows = run(make_config(folder, tmp_path / "a", tasks=tasks, policies=policies))
    again = run(make_config(folder, tmp_path / "b", tasks=tasks, policies=policies))
    other = run(make_config(folder, tmp_path / "c", tasks=tasks, policies=policies, seed=1))
    assert rows == again[1] != other[1]
    values = {row["metric"]: row["value"] for row in results["figures"]}
    assert sorted(values) == [f"exact_match,digit{maj}" for maj in ("", " maj@4", " maj@5")]
    # Every fifth sum counts as solved by the letter that its first sample has.
    for k in (4, 5):
        chances = [majority_is(row["responses"], row["target"], k) for row in rows]
        assert values[f"exact_match,digit maj@{k}"] == pytest.approx(sum(chances) / len(chances))


def majority_is(responses: list[str], target: str, k: int) -> float:
    """Return the chance that for most of k responses the first letter of a to m is the target."""
    letters = [(re.findall("[a-m]", response) or [None])[0] for response in responses]
    total = 0.0
    subsets = list(combinations(letters, k))
    for subset in subsets:
        votes = Counter(letter for letter in subset if letter is not None)
        winners = [letter for letter, number in votes.items() if number == max(votes.values())]
        total += winners.count(target) / max(1, len(winners))
    return total / len(subsets)


def test_a_policy_on_plain_text_only_and_a_limit(folder: Path, tmp_path: Path) -> None:
    policies = {"untaught": str(folder / "untaught"), "first": str(folder / "first")}
    config = make_config(
        folder, tmp_path / "out", policies=policies, plain_only=["untaught"], limit=5
    )
    results, rows = run(config)
    assert {(row["policy"], row["rendering"]) for row in rows} == {
        ("untaught", "plain"),
        ("first", "plain"),
        ("first", "chat"),
    }
    assert results["tasks"]["mc"]["questions"] == 5
    assert {row["rendering"] for row in results["tax"]} == {"plain"}
    tables = (tmp_path / "out" / "benchmark.md").read_text(encoding="utf-8")
    assert "## Against untaught" in tables


SHOTS = {"mc": TaskSettings(shots=[1])}


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ({"data_files": {"test": "gone.jsonl"}}, {}, r"gone\.jsonl, which does not exist"),
        ({"test_split": None}, {}, r"mc\.yaml has no test_split; name the split"),
        ({"test_split": "dev"}, {}, r"no file for its split dev: .* names test"),
        ({"data_files": {}}, {}, r"data_files is \{\}; give a file for each split"),
        ({"data_files": {"test": "broken.jsonl"}}, {}, r"broken\.jsonl, row 2"),
        ({"task": "mk"}, {}, r"mc\.yaml names its task 'mk'; give it the name of the file, mc"),
        ({"doc_to_txt": "q"}, {}, r"mc\.yaml: lm-evaluation-harness refuses it.*doc_to_txt"),
        ({}, {"tasks": {"mcc": TaskSettings()}}, r"tasks\.mcc: there is no .*did you mean mc"),
        ({}, {"tasks": {"mc": TaskSettings(shots=[5])}}, r"num_shot_questions is 4 and"),
        ({}, {"tasks": SHOTS, "num_shot_questions": 14}, r"leaves no question; lower it"),
        ({}, {"tasks": {"mc": TaskSettings(samples=4)}}, r"samples is 4, but mc rates given texts"),
        (
            {"data_files": {"test": "rows.jsonl", "train": "leak.jsonl"}, "fewshot_split": "train"},
            {"tasks": SHOTS},
            r"mc\.yaml: row 2 of the examples asks what row 4 of the test asks: 'what is",
        ),
        (
            {"data_files": {"test": "rows.jsonl", "train": "one.jsonl"}, "fewshot_split": "train"},
            {"tasks": {"mc": TaskSettings(shots=[2])}},
            r"tasks\.mc\.shots asks for 2 examples, and .*mc\.yaml has 1",
        ),
        (
            {},
            {"policies": {"untaught": "untaught"}},
            r"policy untaught at .* has no chat template; give plain_only: \[untaught\]",
        ),
    ],
)
def test_bad_input_is_one_message_and_nothing_half_written(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    task: dict[str, Any],
    changes: dict[str, Any],
    message: str,
) -> None:
    own_tasks = functools.partial(TaskManager, include_defaults=False, include_path=str(tmp_path))
    monkeypatch.setattr(stages.benchmark.tasks, "TaskManager", own_tasks)  # all takes seconds
    monkeypatch.setattr(stages.benchmark.task_names, "harness_task_folder", lambda: tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)
    write_rows(tmp_path / "one.jsonl", [{**ROWS[0], "query": "what else"}])
    write_rows(tmp_path / "leak.jsonl", [{**ROWS[0], "query": "what else"}, ROWS[3]])
    (tmp_path / "broken.jsonl").write_text(json.dumps(ROWS[0]) + "\n{", encoding="utf-8")
    words = dict(task)
    if "data_files" in words:
        words["dataset_kwargs"] = {"data_files": words.pop("data_files")}
    name = words.pop("task", "mc")
    write_task(tmp_path, "mc", {**CHOICES, "task": name}, **words)
    if "policies" in changes:
        changes = {**changes, "policies": {"untaught": str(folder / "untaught")}}
    config = make_config(folder, tmp_path / "out", task_dir=str(tmp_path), **changes)
    config = type(config)(**{**vars(config), "data_dir": str(tmp_path)})
    with pytest.raises(SystemExit) as stop:
        run_stage(lambda _: benchmark(config), Config, words_of(config))
    assert stop.value.code == USER_ERROR
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def words_of(config: Config) -> list[str]:
    """Return any settings that load; the test puts its own in their place."""
    return ["--policies.a", "b", "--tasks", "{mc: {}}", "--output_dir", config.output_dir]


def test_rows_that_ask_the_same_go_to_the_same_side() -> None:
    questions = [f"question {i % 20}" for i in range(60)]
    held_out = hold_out(questions, 7)
    assert sum(held_out) == 7 * 3
    assert held_out[:20] == held_out[20:40] == held_out[40:]
    assert hold_out(questions[::-1], 7) == held_out[::-1]


def test_sampling_that_our_engine_lacks_is_refused(folder: Path, tmp_path: Path) -> None:
    top_p = {**SUMS["generation_kwargs"], "do_sample": True, "temperature": 1.0, "top_p": 0.9}
    write_task(tmp_path, "sums", SUMS, generation_kwargs=top_p)
    tasks = {"sums": TaskSettings(renderings=PLAIN)}
    config = make_config(folder, tmp_path / "out", tasks=tasks, task_dir=str(tmp_path))
    with pytest.raises(ValueError, match="asks to sample with top_p"):
        benchmark(config)
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_task_of_the_harness_keeps_its_own_way_of_drawing_examples(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bank").mkdir()
    where = {"data_dir": str(folder), "data_files": {"test": "rows.jsonl"}}
    write_task(tmp_path / "bank", "banked", CHOICES, dataset_kwargs=where)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    own_tasks = functools.partial(
        TaskManager, include_defaults=False, include_path=str(tmp_path / "bank")
    )
    monkeypatch.setattr(stages.benchmark.tasks, "TaskManager", own_tasks)
    monkeypatch.setattr(
        stages.benchmark.task_names, "harness_task_folder", lambda: tmp_path / "bank"
    )
    tasks = {"banked": TaskSettings(shots=[2], renderings=PLAIN)}
    policies = {"first": str(folder / "first")}
    results, rows = run(make_config(folder, tmp_path / "out", tasks=tasks, policies=policies))
    assert results["tasks"]["banked"]["source"] == "lm_eval: banked"
    assert len(rows) == len(ROWS)  # none is held out: the examples come from the test split


@pytest.mark.long
def test_every_task_name_of_the_harness_is_found_in_its_files(tmp_path: Path) -> None:
    check_names(TaskManager().all_tasks, str(tmp_path))


@pytest.mark.parametrize("path", sorted(Path("configs/benchmark/tasks").glob("*.yaml")), ids=str)
def test_every_task_file_can_be_read(path: Path) -> None:
    assert read_task_file(path)["task"] == path.stem
