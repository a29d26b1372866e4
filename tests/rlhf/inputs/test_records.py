import json
import math
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.inputs.records import (
    RECORD_CLASSES,
    Demonstration,
    Prompt,
    Ranking,
    Record,
    RecordError,
    Text,
    name_rows,
    naming_row,
    prompt_key,
    with_equal_responses,
)

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "And now?"},
]


def ranking_row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "Name a fruit.", "responses": ["fig", "car"], "ranks": [1, 2]} | changes


def soft_row(*probabilities: Any, **changes: Any) -> dict[str, Any]:
    row = {"prompt": "Name a fruit.", "responses": ["fig", "car", "kiwi"]}
    return row | {"probabilities": list(probabilities)} | changes


def demonstration_row(**changes: Any) -> dict[str, Any]:
    return {"prompt": "Name a fruit.", "response": "fig"} | changes


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("demonstration", demonstration_row()),
        ("demonstration", demonstration_row(prompt=MESSAGES, response="")),
        ("ranking", ranking_row()),
        ("ranking", ranking_row(ranks=[None, 3], source="hh", labeler="ann")),
        ("ranking", ranking_row(weight=0.5)),
        ("ranking", soft_row([1, 0, 0.7], [0, 2, 1], weight=2, labeler="gpt")),
        ("prompt", {"prompt": MESSAGES}),
        ("prompt", {"prompt": "Hello", "meta": {"answer": "18", "kwargs": [{}, None]}}),
        ("text", {"text": "Once upon a time."}),
    ],
)
def test_a_row_comes_back_as_it_was(kind: str, row: dict[str, Any]) -> None:
    assert RECORD_CLASSES[kind].from_row(row).to_row() == row


def test_absent_and_null_are_the_same_for_optional_fields() -> None:
    row = ranking_row(source=None, labeler=None)
    assert Ranking.from_row(row) == Ranking.from_row(ranking_row())
    row = ranking_row(weight=None, probabilities=None)
    assert Ranking.from_row(row) == Ranking.from_row(ranking_row(weight=1))
    for ranks in (None, [None, None, None]):
        row = soft_row([0, 1, 0.7], ranks=ranks)
        assert Ranking.from_row(row) == Ranking.from_row(soft_row([0, 1, 0.7]))
    assert Prompt.from_row({"prompt": "a", "meta": None}) == Prompt("a")


def test_pairs_name_the_better_first_and_leave_ties_and_unranked_out() -> None:
    ranking = Ranking("p", ("a", "b", "c", "d"), (2, 1, 2, None))
    assert ranking.pairs() == [(1, 0), (1, 2)]
    assert ranking.preferences() == [(1, 0, 1.0), (1, 2, 1.0)]


def test_soft_pairs_name_the_likelier_first_and_even_ones_are_no_pair() -> None:
    ranking = Ranking.from_row(soft_row([0, 1, 0.25], [1, 2, 0.5], [0, 2, 0.75]))
    assert ranking.preferences() == [(1, 0, 0.75), (1, 2, 0.5), (0, 2, 0.75)]
    assert ranking.pairs() == [(1, 0), (0, 2)]


def test_a_ranking_of_some_of_the_responses() -> None:
    ranking = Ranking("p", ("a", "b", "c"), (1, None, 2), source="x", weight=3.0)
    expected = Ranking("p", ("c", "a"), (2, 1), source="x", weight=3.0)
    assert ranking.restricted_to([2, 0]) == expected
    soft = Ranking.from_row(soft_row([0, 1, 0.25], [1, 2, 0.5], [0, 2, 0.75]))
    assert soft.restricted_to([2, 0]).probabilities == ((1, 0, 0.75),)


@pytest.mark.parametrize(
    ("record_class", "row", "field", "words"),
    [
        (Ranking, ranking_row(ranks=[1, 2, 3]), "ranks", "3 ranks for 2 responses"),
        (Ranking, ranking_row(responses=["fig"], ranks=[1]), "responses", "K = 1"),
        (Ranking, ranking_row(responses=[], ranks=[]), "responses", "K = 0"),
        (Ranking, ranking_row(responses="fig"), "responses", "expected a list"),
        (Ranking, ranking_row(responses=["fig", 3]), "responses[1]", "3 (int)"),
        (Ranking, ranking_row(ranks=[0, 1]), "ranks[0]", "number the ranks from 1"),
        (Ranking, ranking_row(ranks=[1.5, 1.5]), "ranks[0]", "the same whole rank"),
        (Ranking, ranking_row(ranks=[1.0, math.nan]), "ranks[1]", "write null for NaN"),
        (Ranking, ranking_row(ranks=[True, 2]), "ranks[0]", "True"),
        (Ranking, ranking_row(source=5), "source", "expected a string"),
        (Ranking, ranking_row(weight=0), "weight", "found 0; expected a number from 1e-06"),
        (Ranking, ranking_row(weight=float("nan")), "weight", "remove the row"),
        (Ranking, ranking_row(weight=10**400), "weight", "to 1e+06"),
        (Ranking, ranking_row(weight="1"), "weight", "found '1'"),
        (Ranking, ranking_row(weight=True), "weight", "found True"),
        (Ranking, ranking_row(probabilities=[[0, 1, 1]]), "probabilities", "beside ranks [1, 2]"),
        (
            Ranking,
            soft_row(ranks=[None, 2, 1]) | {"probabilities": [[0, 1, 1]]},
            "probabilities",
            "either ranks or probabilities",
        ),
        (Ranking, soft_row(probabilities=None), "ranks", "no such field"),
        (Ranking, soft_row(probabilities=0.7), "probabilities", "expected a list"),
        (Ranking, soft_row(0.7), "probabilities[0]", "expected a list"),
        (Ranking, soft_row([0, 1, 0.7], [0, 2]), "probabilities[1]", "write [0, 1, 0.7]"),
        (Ranking, soft_row([0, 3, 0.7]), "probabilities[0]", "found response 3; expected a whole"),
        (Ranking, soft_row([-1, 0, 0.7]), "probabilities[0]", "from 0 to 2"),
        (Ranking, soft_row([0, True, 0.7]), "probabilities[0]", "found response True"),
        (Ranking, soft_row([0, 1.5, 0.7]), "probabilities[0]", "found response 1.5"),
        (Ranking, soft_row([0, 1, 70]), "probabilities[0]", "divide a percentage by 100"),
        (Ranking, soft_row([0, 1, float("nan")]), "probabilities[0]", "found probability nan"),
        (Ranking, soft_row([0, 1, None]), "probabilities[0]", "found probability None"),
        (Ranking, soft_row([1, 1, 0.5]), "probabilities[0]", "response 1 against itself"),
        (Ranking, soft_row([0, 1, 0.7], [1, 0, 0.3]), "probabilities[1]", "pair 1, 0 once more"),
        (Demonstration, {"prompt": "a"}, "response", "the row has prompt"),
        (Demonstration, demonstration_row(response=None), "response", "None (NoneType)"),
        (Demonstration, demonstration_row(response="\ud800"), "response", "surrogate"),
        (Demonstration, {"prompt": "a", "reponse": "b"}, "reponse", "did you mean 'response'?"),
        (Demonstration, demonstration_row(prompt=" \n"), "prompt", "a prompt with text"),
        (Demonstration, demonstration_row(prompt=3), "prompt", "3 (int)"),
        (Demonstration, ["a", "b"], "row", "a JSON object with prompt, response"),
        (Prompt, {"prompt": []}, "prompt", "no messages"),
        (Prompt, {"prompt": MESSAGES[:3]}, "prompt[2].role", "'user' in the last turn"),
        (Prompt, {"prompt": [MESSAGES[1], MESSAGES[1]]}, "prompt[1].role", "after 'user'"),
        (Prompt, {"prompt": [MESSAGES[1], MESSAGES[0]]}, "prompt[1].role", "after 'user'"),
        (Prompt, {"prompt": MESSAGES[2:]}, "prompt[0].role", "in the first turn"),
        (Prompt, {"prompt": [{"role": "human", "content": "a"}]}, "prompt[0].role", "'human'"),
        (Prompt, {"prompt": [{"role": "user"}]}, "prompt[0].content", "no such field"),
        (Prompt, {"prompt": [{"role": "user", "contnet": "a"}]}, "prompt[0].contnet", "'content'?"),
        (Prompt, {"prompt": [{"role": "user", "content": " "}]}, "prompt[0].content", "with text"),
        (Prompt, {"prompt": "a", "meta": {1: "x"}}, "meta", "a JSON object"),
        (Prompt, {"prompt": "a", "meta": [1]}, "meta", "a JSON object"),
        (Prompt, {"prompt": "a", "meta": {"x": float("nan")}}, "meta", "without NaN"),
        (Text, {"text": "  "}, "text", "a document"),
        (Text, {"txt": "a"}, "txt", "did you mean 'text'?"),
    ],
)
def test_a_bad_row_is_named_by_field(
    record_class: type[Record], row: Any, field: str, words: str
) -> None:
    with pytest.raises(RecordError) as raised:
        record_class.from_row(row)
    assert raised.value.field == field
    assert words in str(raised.value)
    assert raised.value.remedy in str(raised.value)


@pytest.mark.parametrize(
    "ranks",
    [
        (1.0, 2.0, None),
        (np.int64(1), np.float32(2), None),
        (torch.tensor(1), torch.tensor(2.0), None),
    ],
)
def test_whole_numbers_of_other_types_are_ranks(ranks: tuple[Any, ...]) -> None:
    ranking = Ranking("p", ("a", "b", "c"), ranks, weight=np.float64(0.5))
    assert json.dumps(ranking.to_row()["ranks"]) == "[1, 2, null]"
    assert ranking == Ranking("p", ("a", "b", "c"), (1, 2, None), weight=0.5)


def test_probabilities_of_numpy_are_taken() -> None:
    triples: tuple[Any, ...] = ((np.int64(1), 0.0, np.float32(0.75)),)
    ranking = Ranking("p", ("a", "b"), (None, None), probabilities=triples)
    assert json.dumps(ranking.to_row()["probabilities"]) == "[[1, 0, 0.75]]"
    wrong_ranks: tuple[Any, ...] = (np.bool_(True), np.float64("nan"), np.float64(1.5))
    for wrong in wrong_ranks:
        with pytest.raises(RecordError, match=r"ranks\[0\]"):
            Ranking("p", ("a", "b"), (wrong, 2))


def test_equal_responses_make_no_pair() -> None:
    ranking = Ranking("p", ("a", "b", "a"), (1, 2, 3))
    assert ranking.preferences() == [(0, 1, 1.0), (1, 2, 1.0)]
    assert ranking.equal_pairs() == [(0, 2)]
    soft = Ranking("p", ("", ""), (None, None), probabilities=((0, 1, 0.5),))
    assert (soft.preferences(), soft.equal_pairs()) == ([], [(0, 1)])
    read = with_equal_responses(Ranking("p", ("a ", "b", "a"), (1, 2, 3)), [[1], [2], [1]])
    assert read.responses == ("a ", "b", "a ")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": MESSAGES}, "--format messages`"),
        ({"conversations": [], "id": "x"}, "--format sharegpt`"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--format preference`"),
        ({"chosen": MESSAGES, "rejected": MESSAGES}, "--format preference`"),
        ({"chosen": "a", "rejected": "b"}, "--format hh`"),
        ({"prompt": "a", "completion": "b"}, "--format prompt_completion`"),
        ({"prompt": MESSAGES, "completion": MESSAGES}, "--format prompt_completion`"),
        ({"instruction": "a", "input": "", "output": "b"}, "--format alpaca`"),
        ({"instruction": "a", "context": "", "response": "b"}, "--format dolly`"),
        ({"question": "a", "answer": "b #### 3"}, "--format gsm8k`"),
        ({"question": "a", "answer": "b"}, "--prompt_column question --response_column answer`"),
        ({"input": "a", "output": "b"}, "--prompt_column input --response_column output`"),
        ({"prompt": "a", "answer": "b"}, "--prompt_column prompt --response_column answer`"),
        ("a", "--format strings`"),
    ],
)
def test_a_row_of_a_public_layout_names_its_converter(row: Any, words: str) -> None:
    for record_class in RECORD_CLASSES.values():
        with pytest.raises(RecordError) as raised:
            record_class.from_row(row)
        assert words in raised.value.remedy and "did you mean" not in raised.value.remedy


def test_a_row_of_ours_with_a_fault_is_of_no_other_layout() -> None:
    for row in (demonstration_row(note="x"), {"prompt": "a", "category": "x"}):
        with pytest.raises(RecordError, match="rename or remove it"):
            Demonstration.from_row(row)


def test_messages_name_file_and_row_where_there_is_one() -> None:
    with (
        pytest.raises(ValueError, match=r"^f\.jsonl, row 3: too loud$"),
        naming_row(Prompt("a", place="f.jsonl, row 3")),
    ):
        raise ValueError("too loud")
    with pytest.raises(ValueError, match=r"^too loud$"), naming_row(Prompt("a")):
        raise ValueError("too loud")
    records = [Prompt("a", place=f"f, row {i}") for i in range(5)]
    assert name_rows(records) == " (f, row 0; f, row 1; f, row 2 and 2 more)"
    assert name_rows([Prompt("a")]) == ""
    assert Prompt("a", place="f, row 1") == Prompt("a")


def test_a_record_made_in_memory_is_checked_too() -> None:
    with pytest.raises(RecordError, match="2 ranks for 3 responses"):
        Ranking("p", ("a", "b", "c"), (1, 2))


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(RecordError) as raised:
        Demonstration.from_row(demonstration_row(response=["x" * 10_000]))
    assert len(str(raised.value)) < 300


def test_prompt_key_sees_through_spelling_but_not_through_turns() -> None:
    as_string = prompt_key(" What  is\nthis? ")
    assert as_string == prompt_key([{"role": "user", "content": "What is this?"}])
    assert prompt_key(MESSAGES) != prompt_key(MESSAGES[1:])
    assert prompt_key("a b") != prompt_key("ab")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["system", "user", "assistant", "x"]), "content": st.text()}
    ),
    max_size=4,
)
fields = {
    "prompt": st.text() | messages | json_values,
    "response": st.text() | json_values,
    "responses": st.lists(st.text(), max_size=4) | json_values,
    "ranks": st.lists(st.none() | st.integers(0, 4), max_size=4) | json_values,
    "source": st.text() | json_values,
    "probabilities": st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 3), st.floats(0, 1)).map(list), max_size=3
    )
    | json_values,
    "weight": st.floats(0) | json_values,
    "meta": json_values,
    "text": st.text() | json_values,
}


@st.composite
def rows(draw: st.DrawFn) -> tuple[type[Record], Any]:
    """Draw a kind of record, and a row with most of its fields, some of another type."""
    record_class = draw(st.sampled_from(list(RECORD_CLASSES.values())))
    names = [name for name in record_class.__dataclass_fields__ if name in fields]
    kept = draw(st.sets(st.sampled_from(names))) | (set(names) if draw(st.booleans()) else set())
    row = {name: draw(fields[name]) for name in sorted(kept)}
    extra = draw(st.just({}) | st.dictionaries(st.text(), json_values, max_size=1))
    return record_class, draw(st.just(row | extra) | json_values)


@given(rows())
@settings(deadline=None)
def test_any_row_gives_a_record_or_a_record_error(case: tuple[type[Record], Any]) -> None:
    record_class, row = case
    try:
        record = record_class.from_row(row)
    except RecordError:
        return
    again = record_class.from_row(json.loads(json.dumps(record.to_row())))
    assert again == record
    assert isinstance(record.key, str)


@st.composite
def rankings(draw: st.DrawFn) -> Ranking:
    """Draw a ranking with ranks, or with probabilities of some of its pairs."""
    num = draw(st.integers(2, 6))
    ranks: list[int | None] = [None] * num
    probabilities = []
    if draw(st.booleans()):
        ranks = draw(st.lists(st.none() | st.integers(1, 4), min_size=num, max_size=num))
    else:
        pairs = draw(st.sets(st.sampled_from(list(combinations(range(num), 2)))))
        turned = [pair if draw(st.booleans()) else pair[::-1] for pair in sorted(pairs)]
        probabilities = [(i, j, draw(st.floats(0, 1))) for i, j in turned]
    return Ranking(
        prompt="p",
        responses=tuple(f"response {i}" for i in range(num)),
        ranks=tuple(ranks),
        probabilities=tuple(probabilities),
        weight=draw(st.floats(0.01, 100)),
    )


@given(rankings(), st.data())
@settings(deadline=None)
def test_rankings_survive_the_disk_and_a_choice_of_responses(
    ranking: Ranking, data: st.DataObject
) -> None:
    assert Ranking.from_row(json.loads(json.dumps(ranking.to_row()))) == ranking
    num = len(ranking.responses)
    kept = data.draw(st.permutations(range(num)))[: data.draw(st.integers(2, num))]
    some = ranking.restricted_to(kept)

    def named(one: Ranking) -> set[tuple[str, str, float]]:
        return {(one.responses[i], one.responses[j], p) for i, j, p in one.preferences()}

    chosen = {ranking.responses[i] for i in kept}
    assert named(some) == {(a, b, p) for a, b, p in named(ranking) if {a, b} <= chosen}
