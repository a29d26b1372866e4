"""Tests the collect stage: who ranks what, the report's numbers, and faulty labelers."""

import json
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.inputs.files import read_records, write_records
from rlhf.inputs.records import Prompt, PromptLike, Ranking
from rlhf.models.loading import new_policy
from rlhf.models.saving import save_policy
from rlhf.models.settings import ModelSettings
from rlhf.runs.settings import load_config
from stages.collect.collect import collect, distinct_texts
from stages.collect.config import Config
from stages.collect.report import (
    agreement,
    agreements,
    describe_rankings,
    describe_samples,
    lines_of,
    tie_share,
)
from tests.rlhf.answers import of_ids
from tests.rlhf.tiny_models import byte_tokenizer


@dataclass
class ByLength:
    """Prefers short responses, or long ones."""

    name: str
    sign: int

    def rank(
        self, prompt: PromptLike, responses: Sequence[str], generator: random.Random
    ) -> list[int | None]:
        lengths = [self.sign * len(response) for response in responses]
        return [sorted(lengths).index(length) + 1 for length in lengths]


def make_both(path: str) -> list[ByLength]:
    return [ByLength("brief", 1), ByLength("wordy", -1)]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tokenizer = byte_tokenizer("<end>", "<pad>", eos_token="<end>", pad_token="<pad>")
    architecture = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    save_policy(new_policy(architecture, tokenizer), tokenizer, tmp_path / "policy")
    return tmp_path / "policy"


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], str]:
    """Put a function into a module; return its name as settings have it."""

    def put(function: Any) -> str:
        module = ModuleType("own_labelers")
        vars(module)["make"] = function
        monkeypatch.setitem(sys.modules, "own_labelers", module)
        return "own_labelers:make"

    return put


def make_config(policy: Path, labelers: str, **changes: Any) -> Config:
    folder = policy.parent
    prompts = folder / "prompts.jsonl"
    write_records(prompts, [Prompt(f"prompt {i}") for i in range(30)])
    settings: dict[str, Any] = {
        "model": ModelSettings(path=str(policy)),
        "prompts": str(prompts),
        "labelers": labelers,
        "labelers_path": str(folder),
        "overlap": 0.5,
        "max_prompt_tokens": 40,
        "max_new_tokens": 6,
        "output_dir": str(folder / "rankings"),
    }
    return Config(**{**settings, **changes})


def read_results(config: Config) -> dict[str, Any]:
    return json.loads((Path(config.output_dir) / "results.json").read_text())


def test_every_prompt_gets_k_ranked_samples(policy: Path, maker: Callable[[Any], str]) -> None:
    config = make_config(policy, maker(make_both))
    collect(config)
    rankings = read_records(Path(config.output_dir) / "rankings.jsonl", Ranking)
    second = read_records(Path(config.output_dir) / "overlap.jsonl", Ranking)
    results = read_results(config)
    assert [one.prompt for one in rankings] == [f"prompt {i}" for i in range(30)]
    sizes = [len(one.responses) for one in rankings]
    assert min(sizes) >= 2 and max(sizes) <= 9 and len(set(sizes)) > 3
    assert 4 * 30 <= results["num_samples"] == sum(sizes) + results["num_duplicates"] <= 9 * 30
    sign = {"brief": 1, "wordy": -1}
    for one in [*rankings, *second]:
        for better, worse in one.pairs():
            difference = len(one.responses[worse]) - len(one.responses[better])
            assert sign[str(one.labeler)] * difference > 0
    assert {one.labeler for one in rankings} == {"brief", "wordy"}
    assert {one.source for one in rankings} == {str(policy)}
    first = {one.prompt: one for one in rankings}
    assert len(second) == 15 == results["num_overlap"]
    for one in second:
        assert one.responses == first[one.prompt].responses
        assert one.labeler != first[one.prompt].labeler
    assert results["agreement"] == 0.0  # the two labelers always want the opposite
    assert results["num_comparisons"] == sum(len(one.pairs()) for one in rankings)
    assert sum(results["num_rankings_by_k"].values()) == 30


def test_same_seed_same_rankings(policy: Path, maker: Callable[[Any], str]) -> None:
    written = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        config = make_config(
            policy, maker(make_both), output_dir=str(policy.parent / name), seed=seed
        )
        collect(config)
        written.append((Path(config.output_dir) / "rankings.jsonl").read_bytes())
    assert written[0] == written[1] != written[2]


def test_without_overlap_one_labeler_is_enough(policy: Path, maker: Callable[[Any], str]) -> None:
    config = make_config(policy, maker(lambda path: [ByLength("only", 1)]), overlap=0.0)
    two = replace(config, labelers=maker(make_both), overlap=1.0)
    collect(two)
    stale = Path(config.output_dir) / "overlap.jsonl"
    assert stale.exists()
    config = replace(config, labelers=maker(lambda path: [ByLength("only", 1)]), overwrite=True)
    collect(config)
    assert read_results(config)["agreement"] is None
    assert not stale.exists()


def ranking(*ranks: int | None) -> Ranking:
    return Ranking("p", tuple("abcd"[: len(ranks)]), ranks)


def test_agreement_worked_by_hand() -> None:
    # a<b, a<c and b<c against a<c, b<a, b<c: two of three pairs alike.
    assert sorted(agreements(ranking(1, 2, 3), ranking(2, 1, 3))) == [0.0, 1.0, 1.0]
    # The first ties (a, b), the second (b, c); (a, c) is left, and on it they differ.
    assert agreements(ranking(1, 1, 2), ranking(2, 1, 1)) == [0.0]
    # The second does not rank d, so only (a, b) counts.
    assert agreements(ranking(1, 2), ranking(1, 2)) == [1.0]
    assert agreements(ranking(1, None, 2), ranking(1, 2, None)) == []
    overlap = [
        (ranking(1, 2, 3), ranking(2, 1, 3)),
        (ranking(1, 1, 2), ranking(2, 1, 1)),
        (ranking(1, 2), ranking(1, 2)),
    ]
    report = agreement(overlap, seed=0)
    assert report["agreement"] == pytest.approx(3 / 5)
    assert report["num_agreement_pairs"] == 5
    low, high = report["agreement_interval"]
    assert 0 <= low < 3 / 5 < high <= 1
    assert agreement([], seed=0)["agreement"] is None


def test_ties_and_lengths_worked_by_hand() -> None:
    assert tie_share([ranking(1, 1, 2), ranking(1, None, 1), ranking(1, 2)]) == pytest.approx(2 / 5)
    groups = [
        [of_ids([5], [7, 0], text="a", is_finished=True)] * 2,
        [of_ids([5], [8] * 5, text="b")],
    ]
    described = describe_samples(groups)
    assert described["eos_rate"] == pytest.approx(2 / 3)
    assert described["response_tokens"] == 3 and described["response_tokens_max"] == 5
    assert distinct_texts(groups[0]) == ["a"]


def test_what_is_printed_worked_by_hand() -> None:
    rankings = [ranking(1, 1, 2), ranking(1, 1)]
    groups = [[of_ids([5], [7, 0], text="a", is_finished=True), of_ids([5], [8] * 5, text="b")]]
    overlap = [(ranking(1, 2, 3), ranking(2, 1, 3))]
    counts = {"num_prompts_dropped": 0, "num_prompts_without_choice": 3, "num_duplicates": 0}
    described = describe_rankings(rankings) | describe_samples(groups) | counts
    first, second, *others = lines_of({**described, **agreement(overlap, seed=0)})
    assert first == ("2 rankings of 2 to 3 responses give 2 comparisons; 50.0% of the pairs tie")
    assert second.startswith("labelers agree on 66.7% (")
    assert second.endswith(") of 3 pairs that two of them ordered")
    assert others == [
        "responses have 3.5 tokens on average, 5 at most; 50.0% end",
        "prompts left out, since all their responses are equal: 3",
        "rankings without a comparison, since all responses tie: 1",
    ]
    assert len([*lines_of({**described, **agreement([], seed=0)})]) == 4


class Wrong:
    """Returns the given ranks, whatever they are."""

    name = "wrong"

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def rank(self, prompt: PromptLike, responses: Sequence[str], generator: random.Random) -> Any:
        return self.answer


@pytest.mark.parametrize(
    "made, message",
    [
        (
            [Wrong([1, 2])],
            r"'wrong' answered .* 'prompt 0' \(.*prompts.jsonl, row 1\): .*2 ranks for",
        ),
        ([Wrong([0.5] * 9)], "labeler 'wrong' answered"),
        ([Wrong(None)], "labeler 'wrong' answered None"),
        ([], "made no labeler"),
        (["a name"], "must return a list of labelers"),
        (None, "must return a list of labelers"),
    ],
)
def test_labelers_that_misbehave_are_named(
    policy: Path, maker: Callable[[Any], str], made: Any, message: str
) -> None:
    config = make_config(policy, maker(lambda path: made), overlap=0.0)
    with pytest.raises(ValueError, match=message):
        collect(config)
    assert not Path(config.output_dir).exists()


@dataclass
class Moody:
    """Ranks at random, and raises an error at some prompts."""

    name: str
    absent: list[str]
    asked: list[PromptLike]

    def rank(
        self, prompt: PromptLike, responses: Sequence[str], generator: random.Random
    ) -> list[int | None]:
        if prompt in self.absent:
            raise ConnectionError("gone")
        self.asked.append(prompt)
        return [generator.randint(1, 3) for _ in responses]


def test_ranks_of_numpy_are_taken(policy: Path, maker: Callable[[Any], str]) -> None:
    class OfNumpy(ByLength):
        def rank(self, *arguments: Any) -> Any:
            return np.array(super().rank(*arguments), dtype=float)

    config = make_config(policy, maker(lambda path: [OfNumpy("array", 1)]), overlap=0.0)
    collect(config)
    rows = (Path(config.output_dir) / "rankings.jsonl").read_text().splitlines()
    ranks = [rank for row in rows for rank in json.loads(row)["ranks"]]
    assert {type(rank) for rank in ranks} == {int}


def test_the_same_command_goes_on_where_a_labeler_failed(
    policy: Path, maker: Callable[[Any], str], capsys: pytest.CaptureFixture[str]
) -> None:
    absent, asked = ["prompt 3"], list[PromptLike]()
    moody = maker(lambda path: [Moody(name, absent, asked) for name in ("left", "right")])
    config = make_config(policy, moody)
    files = [Path(config.output_dir) / name for name in ("rankings.jsonl", "overlap.jsonl")]
    so_far = Path(config.output_dir) / "rankings_so_far.jsonl"
    for there, last in (("prompt 3", "prompt 20"), ("prompt 20", "nobody")):
        with pytest.raises(
            ValueError,
            match=rf"failed at '{there}' \(.*prompts\.jsonl, row {int(there[7:]) + 1}\): Conn",
        ):
            collect(config)
        assert f"{there[7:]} prompts were ranked, see {so_far}" in capsys.readouterr().out
        absent[:] = [last]
    collect(config)
    assert "collect: goes on from" in capsys.readouterr().out and not so_far.exists()
    found, num_asked = [path.read_text() for path in files], len(asked)
    assert num_asked == sum(text.count("\n") for text in found), "nobody was asked twice"
    collect(replace(config, force=True))
    assert [path.read_text() for path in files] == found and len(asked) == 2 * num_asked


def test_rankings_of_other_responses_are_neither_gone_on_from_nor_lost(
    policy: Path, maker: Callable[[Any], str]
) -> None:
    absent, asked = ["prompt 3"], list[PromptLike]()
    moody = maker(lambda path: [Moody("moody", absent, asked)])
    config = make_config(policy, moody, overlap=0.0)
    with pytest.raises(ValueError, match="gone"):
        collect(config)
    so_far = Path(config.output_dir) / "rankings_so_far.jsonl"
    kept = so_far.read_text()
    with pytest.raises(ValueError, match=r"holds the unfinished run .* seed was 0 and is 1; give"):
        collect(replace(config, seed=1))
    maker(lambda path: [Moody("another", absent, asked)])
    with pytest.raises(
        ValueError, match=r"^rankings_so_far\.jsonl of .* other responses .* settin"
    ):
        collect(config)
    assert so_far.read_text() == kept and len(asked) == 3
    absent.clear()
    collect(replace(config, seed=1, overwrite=True))
    assert not so_far.exists()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labelers": "no_such_module:make"}, "cannot import no_such_module"),
        ({"labelers": "data.tinyworld:no_such"}, "no function 'no_such'"),
        ({"labelers": "data.tinyworld"}, "write package.module:name"),
        ({"max_prompt_tokens": 5}, "30 of 30 prompts are over max_prompt_tokens 5"),
        ({"max_new_tokens": 60}, "max_new_tokens 60 is more than the 64 tokens"),
        ({"temperature": 1e-6}, "nothing to compare; raise temperature"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    policy: Path, maker: Callable[[Any], str], changes: dict[str, Any], message: str
) -> None:
    config = make_config(policy, **{"labelers": maker(make_both), **changes})
    with pytest.raises(ValueError, match=message):
        collect(config)
    assert not Path(config.output_dir).exists()


def test_overlap_needs_two_labelers(policy: Path, maker: Callable[[Any], str]) -> None:
    config = make_config(policy, maker(lambda path: [ByLength("only", 1)]))
    with pytest.raises(ValueError, match=r"overlap is 0\.5, but own_labelers:make made one"):
        collect(config)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--num_responses_min", "1"], "num_responses_min is 1"),
        (["--num_responses_min", "5", "--num_responses_max", "4"], "max is 4, below .* 5"),
        (["--temperature", "0"], "temperature is 0"),
        (["--overlap", "1.5"], "overlap is 1.5"),
        (["--labeler", "a:b"], "did you mean labelers"),
    ],
)
def test_contradictory_settings_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(Config, ["--config", "configs/collect/tiny.yaml", *options])
