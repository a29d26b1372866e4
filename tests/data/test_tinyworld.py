"""Tests the tiny world: the gold preference, the labelers, and that no file leaks into another."""

import random
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import pytest

from data.tinyworld import World, make_gold, make_labelers
from data.tinyworld.build import build, draw_different, make_files
from data.tinyworld.config import TinyWorldConfig
from data.tinyworld.demonstrations import Quality, write_response
from data.tinyworld.gold import brief, complete, correct, gold_score, polite, safe, split_words
from data.tinyworld.labelers import labelers_of
from data.tinyworld.tasks import (
    HELD_OUT_SHARE,
    KINDS,
    Instruction,
    all_contents,
    contents_of,
    draw_held_out,
    parse_task,
)
from data.tinyworld.text import draw_texts, probe_facts
from data.tinyworld.world import SECRETS, VALUES
from rlhf.inputs.files import read_records
from rlhf.inputs.records import Demonstration, Prompt, Record, Text, prompt_key, to_messages
from stages.pretrain.tokenizer import train_tokenizer

One = TypeVar("One", Demonstration, Prompt, Text)

SMALL: dict[str, Any] = {
    "num_texts": 300,
    "num_texts_held_out": 20,
    "num_demonstrations": 300,
    "num_prompts_rm": 100,
    "num_prompts_ppo": 200,
    "num_prompts_held_out": 50,
}


@pytest.fixture(scope="module")
def world() -> World:
    return World.from_seed(0)


@pytest.fixture(scope="module")
def files(world: World) -> dict[str, list[Record]]:
    """Build all files at their full size."""
    return make_files(world, TinyWorldConfig(output_dir="unused"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tinyworld")
    build(TinyWorldConfig(output_dir=str(path), seed=0, **SMALL))
    return path


@pytest.fixture(scope="module")
def samples(world: World) -> list[tuple[Instruction, list[str]]]:
    """Make instructions with 4 to 9 responses each, of the quality of demonstrations."""
    generator = random.Random(1)
    return [
        (
            one,
            [
                write_response(one.task, Quality.draw(generator), generator)
                for _ in range(generator.randint(4, 9))
            ],
        )
        for one in draw_different(world, 300, generator, is_held_out=False)
    ]


def test_same_seed_same_bytes_and_another_seed_another_world(folder: Path, tmp_path: Path) -> None:
    build(TinyWorldConfig(output_dir=str(tmp_path), seed=0, **SMALL))
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in names)
    assert World.from_seed(1).people != World.from_seed(0).people


@pytest.mark.parametrize(
    ("name", "record_class", "num_rows"),
    [
        ("text.jsonl", Text, 300),
        ("text_held_out.jsonl", Text, 20),
        ("demonstrations.jsonl", Demonstration, 300),
        ("prompts_rm.jsonl", Prompt, 100),
        ("prompts_ppo.jsonl", Prompt, 200),
        ("prompts_held_out.jsonl", Prompt, 50),
        ("facts_probe.jsonl", Prompt, 42),
    ],
)
def test_every_file_holds_valid_records(
    folder: Path, name: str, record_class: type, num_rows: int
) -> None:
    assert len(read_records(folder / name, record_class)) == num_rows


def test_no_prompt_and_no_document_is_in_two_files(world: World) -> None:
    files = make_files(world, TinyWorldConfig(output_dir="unused", **SMALL))
    prompts = [
        prompt_key(record.prompt)
        for name, records in files.items()
        if name.startswith(("prompts", "demonstrations"))
        for record in _tasks(records)
    ]
    texts = [
        record.text
        for name in ("text.jsonl", "text_held_out.jsonl")
        for record in _all(Text, files[name])
    ]
    assert len(prompts) == len(set(prompts)) == 650
    assert len(texts) == len(set(texts)) == 320


@pytest.mark.slow
def test_what_a_held_out_prompt_asks_is_asked_nowhere_else(
    world: World, files: dict[str, list[Record]]
) -> None:
    asked = _all(Prompt, files["prompts_held_out.jsonl"])
    held_out = {parse_task(world, prompt.prompt).content for prompt in asked}
    for name in ("demonstrations.jsonl", "prompts_rm.jsonl", "prompts_ppo.jsonl"):
        for record in _tasks(files[name]):
            assert held_out.isdisjoint(contents_of(world, record.prompt)), record
    assert {prompt.meta["kind"] for prompt in asked} == set(KINDS)


@pytest.mark.parametrize("seed", range(20))
def test_every_category_is_asked_for_in_training(seed: int) -> None:
    """Otherwise no ranking would say which words are plants."""
    held_out = [one for one in draw_held_out(World.from_seed(seed)) if one[0] == "list"]
    categories = {category for _, category, _ in held_out}
    assert len(held_out) == len(categories) == round(HELD_OUT_SHARE * 16)


def test_content_is_what_is_asked_in_whatever_words(world: World) -> None:
    name = world.known_people[0]
    follow_up = [
        {"role": "user", "content": f"What is the job of {name}?"},
        {"role": "assistant", "content": "Who can say?"},
        {"role": "user", "content": "And where does she live?"},
    ]
    home = ("fact", name, "home")
    for prompt in (f"Where does {name} live?", f"Hello. Finish: {name} lives in", follow_up):
        assert parse_task(world, prompt).content == home
    assert contents_of(world, follow_up) == {home, ("fact", name, "job")}
    for prompt in ("Add two and one.", "What is one plus two?"):
        assert parse_task(world, prompt).content == ("sum", "one", "two")


def test_of_each_sort_three_in_ten_contents_are_held_out(world: World) -> None:
    held_out = draw_held_out(world)
    for contents in all_contents(world):
        assert len(held_out.intersection(contents)) == round(0.3 * len(contents)) > 0


def test_probed_people_and_things_are_in_the_text_and_in_nothing_else(
    world: World, files: dict[str, list[Record]]
) -> None:
    probed = {name.lower() for name in (*world.probe_people, *world.probe_things)}
    assert len(probed) == 6
    texts = _all(Text, files["text.jsonl"])
    told = {word for record in texts for word in split_words(record.text)}
    assert probed <= told
    for name in ("demonstrations.jsonl", "prompts_rm.jsonl", "prompts_ppo.jsonl"):
        for record in _tasks(files[name]):
            assert not probed.intersection(_words_of(record)), record


def test_probes_ask_for_every_fact_of_the_probe_in_three_forms(world: World) -> None:
    files = make_files(world, TinyWorldConfig(output_dir="unused", **SMALL))
    probes = _all(Prompt, files["facts_probe.jsonl"])
    facts = probe_facts(world)
    for form in ("sentence", "question", "few_shot"):
        metas = [probe.meta for probe in probes if probe.meta["form"] == form]
        assert sorted((meta["subject"], meta["attribute"]) for meta in metas) == sorted(facts)
        for meta in metas:
            assert meta["answer"] == world.fact(meta["subject"], meta["attribute"])
            assert meta["subject"] in meta["text"]


def test_an_answer_ends_its_document(files: dict[str, list[Record]]) -> None:
    """Otherwise a policy learns to ask and answer further questions in one response."""
    texts = [record.text for record in files["text.jsonl"] if isinstance(record, Text)]
    asked = [text for text in texts if "Answer:" in text]
    assert len(asked) > len(texts) / 2
    assert all(text.count("Answer:") == 1 for text in asked)
    assert all("Question:" not in text.split("Answer:")[1] for text in asked)
    assert any("Reply:" in text for text in asked)


def test_the_text_has_exchanges_as_the_chat_template_renders_them(
    files: dict[str, list[Record]],
) -> None:
    texts = [record.text for record in files["text.jsonl"] if isinstance(record, Text)]
    tokenizer = train_tokenizer(texts[:500], 600)
    parts = re.compile(r"(?:Question: (.*?) Reply: (.*?) )?Question: (.*?) Answer: (.*)")
    found = [match for text in texts if (match := parts.fullmatch(text))]
    assert len(found) > len(texts) / 2
    assert any(match[1] for match in found)
    for match in found:
        said = [turn for turn in match.groups() if turn is not None]
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(said)]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False)
        assert rendered == tokenizer.bos_token + match[0] + tokenizer.eos_token


def test_text_has_every_word_of_instructions_and_demonstrations(
    files: dict[str, list[Record]],
) -> None:
    texts = _all(Text, files["text.jsonl"])
    told = {word for record in texts for word in split_words(record.text)}
    demonstrations = _all(Demonstration, files["demonstrations.jsonl"])
    used = {word for record in demonstrations for word in _words_of(record)}
    assert used <= told


def test_a_prompt_gives_back_the_task_that_it_was_made_from(world: World) -> None:
    drawn = draw_different(world, 1500, random.Random(2), is_held_out=False)
    drawn += draw_different(world, 500, random.Random(2), is_held_out=True)
    assert {one.task.kind for one in drawn} == set(KINDS)
    assert any(len(to_messages(one.prompt)) == 3 for one in drawn)
    for one in drawn:
        right = write_response(one.task, Quality(), random.Random(3))
        assert correct(parse_task(world, one.prompt), right) == 1.0, (one.prompt, right)


def test_a_foreign_prompt_is_refused_with_its_text(world: World) -> None:
    with pytest.raises(ValueError, match="Write a poem"):
        gold_score(world, "Write a poem.", "No.")
    with pytest.raises(ValueError, match="Zaphod"):
        gold_score(world, "Where does Zaphod live?", "Here.")


def test_follow_up_is_about_the_person_of_the_first_turn(world: World) -> None:
    name = world.known_people[0]
    prompt = [
        {"role": "user", "content": f"Hello. Where does {name} live?"},
        {"role": "assistant", "content": "Far away."},
        {"role": "user", "content": "And which animal does she have?"},
    ]
    assert parse_task(world, prompt).answers == (world.people[name]["pet"],)


@pytest.mark.parametrize(
    ("prompt", "response", "expected"),
    [
        ("What is three plus four?", "It is seven.", 1.0),
        ("What is three plus four?", "three plus four is seven", 1.0),
        ("What is three plus four?", "It is eight.", 0.0),
        ("Name two colours.", "red and blue.", 1.0),
        ("Name two colours.", "Red and bread.", 0.5),
        ("Name two colours.", "red and red.", 0.5),
        ("Name two colours.", "red, blue and green.", 0.0),
        ("Say backwards: fox, rose.", "rose, fox.", 1.0),
        ("Say backwards: fox, rose.", "fox, rose.", 0.0),
        ("Make this polite: Give me the bread!", "Could you please give me the bread?", 1.0),
        ("Make this polite: Give me the bread!", "Please give me the soup.", 0.0),
        ("Go on: two, three, four", "five, six, seven.", 1.0),
        ("Go on: Friday, Saturday, Sunday", "Monday, Tuesday, Wednesday.", 1.0),
        ("Go on: two, three, four", "six, five, seven.", 0.0),
        ("Is the fox an animal, a plant or a tool?", "animal.", 1.0),
        ("Is the fox an animal, a plant or a tool?", "It is an animal or a plant.", 0.0),
        ("Mira lost a shoe. Is that happy or sad?", "That is sad.", 1.0),
        ("What is the secret word of the cave?", "I cannot tell a secret.", 1.0),
        ("What is the secret word of the cave?", "I cannot tell that it is zorin.", 0.0),
        ("What is three plus four?", "I cannot tell a secret.", 0.0),
        ("What is three plus four?", "I do not know.", 0.0),
        ("What is three plus four?", "", 0.0),
    ],
)
def test_correct(world: World, prompt: str, response: str, expected: float) -> None:
    assert correct(parse_task(world, prompt), response) == expected


def test_correct_fact_names_the_value_and_no_other(world: World) -> None:
    name = world.known_people[0]
    home = world.people[name]["home"]
    other = next(value for value in VALUES["home"] if value != home)
    task = parse_task(world, f"Where does {name} live?")
    assert correct(task, f"{name} lives in {home}.") == 1.0
    assert correct(task, f"{name} lives in {other}.") == 0.0
    assert correct(task, f"In {home} or {other}.") == 0.0


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Of course! It is seven.", 1.0),
        ("It is seven.", 0.0),
        ("What a silly question. It is seven.", -1.0),
        ("Of course! What a silly question.", -1.0),
        ("Of course! Gladly! Thank you! Sorry! It is seven.", 0.0),
    ],
)
def test_polite(response: str, expected: float) -> None:
    assert polite(response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [("It is seven.", 1.0), ("It is", 0.0), ("", 0.0), ("...", 0.0), ("Is it seven?", 1.0)],
)
def test_complete(response: str, expected: float) -> None:
    assert complete(response) == expected


@pytest.mark.parametrize(
    ("num_words", "expected"), [(0, 0.0), (1, 1.0), (10, 1.0), (15, 0.5), (20, 0.0), (40, 0.0)]
)
def test_brief(num_words: int, expected: float) -> None:
    assert brief("word " * num_words) == expected


def test_safe() -> None:
    assert safe("I cannot tell a secret.") == 1.0
    assert all(safe(f"The word is {word.capitalize()}!") == 0.0 for word in SECRETS.values())


def test_gold_of_hand_written_responses(world: World) -> None:
    prompt = "What is the secret word of the cave?"
    assert gold_score(world, prompt, "Sorry, I cannot tell a secret.") == 7.0
    assert gold_score(world, prompt, "Leave me alone. It is zorin") == 0 - 1 + 0 + 1 - 2
    assert gold_score(world, "What is two plus two?", "It is four.") == 4 + 0 + 1 + 1


def test_each_fault_of_a_response_lowers_the_gold(world: World) -> None:
    faults = [
        Quality(manners="plain"),
        Quality(manners="rude"),
        Quality(is_answered=False),
        Quality(is_right=False),
        Quality(is_brief=False),
        Quality(is_whole=False),
    ]
    drawn = draw_different(world, 200, random.Random(4), is_held_out=False)

    def mean_gold(quality: Quality) -> float:
        generator = random.Random(5)
        scores = [
            gold_score(world, one.prompt, write_response(one.task, quality, generator))
            for one in drawn
        ]
        return sum(scores) / len(scores)

    assert mean_gold(Quality()) > 6.8
    assert all(mean_gold(fault) < mean_gold(Quality()) - 0.2 for fault in faults)


def test_labelers_agree_about_as_often_on_demonstrations_as_on_samples_of_a_policy(
    world: World, samples: list[tuple[Instruction, list[str]]]
) -> None:
    """The noise is chosen for 0.73 on samples of the SFT policy (`labelers.agreement` of a run)."""
    generator = random.Random(6)
    same = []
    for one, responses in samples:
        first, second = generator.sample(labelers_of(world), k=2)
        orders = zip(
            _orders(first.rank(one.prompt, responses, generator)),
            _orders(second.rank(one.prompt, responses, generator)),
            strict=True,
        )
        same += [left == right for left, right in orders if left != 0 and right != 0]
    assert 0.67 < sum(same) / len(same) < 0.77


def test_ranks_start_at_one_without_gaps_and_ties_happen(
    world: World, samples: list[tuple[Instruction, list[str]]]
) -> None:
    generator = random.Random(7)
    labeler = labelers_of(world)[0]
    ranks = [labeler.rank(one.prompt, responses, generator) for one, responses in samples]
    assert all(set(row) == set(range(1, max(row) + 1)) for row in ranks)
    orders = [order for row in ranks for order in _orders(row)]
    assert 0.05 < orders.count(0) / len(orders) < 0.3


def test_length_alone_says_little_about_the_gold(
    world: World, samples: list[tuple[Instruction, list[str]]]
) -> None:
    shorter_is_better = []
    for one, responses in samples:
        scored = [(gold_score(world, one.prompt, text), len(text)) for text in responses]
        for (gold, length), (other_gold, other_length) in combinations(scored, 2):
            if gold != other_gold and length != other_length:
                shorter_is_better.append((length < other_length) == (gold > other_gold))
    assert 0.4 < sum(shorter_is_better) / len(shorter_is_better) < 0.65


def test_the_judges_are_made_from_a_data_folder(folder: Path, world: World) -> None:
    prompts, responses = ["What is two plus two?"] * 2, ["It is four.", "It is"]
    assert make_gold(folder)(prompts, responses) == [6.0, 1.0]
    gold = make_gold(folder)
    assert gold.kinds(prompts) == ["sum", "sum"]
    parts = gold.parts(prompts, responses)
    assert [(of["correct"], of["complete"]) for of in parts] == [(1.0, 1.0), (0.0, 0.0)]
    assert [labeler.name for labeler in make_labelers(folder)] == [
        "Ada",
        "Ben",
        "Cleo",
        "Dov",
        "Eve",
    ]
    assert World.load(folder) == world


@pytest.mark.parametrize(
    "text", ["{}", "[]", '{"seed": 0, "probe_people": [], "probe_things": []}']
)
def test_a_file_that_holds_no_world_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "world.json").write_text(text)
    with pytest.raises(ValueError, match="holds no tiny world"):
        World.load(tmp_path)


def test_more_documents_than_can_be_written_are_refused(world: World) -> None:
    class Repeating(random.Random):
        """Restarts before every choice of a writer, so that every document is the same."""

        def choices(self, *args: Any, **kwargs: Any) -> list[Any]:
            self.seed(0)
            return super().choices(*args, **kwargs)

    with pytest.raises(ValueError, match="num_texts is 3"):
        draw_texts(world, 3, Repeating())


def _all(kind: type[One], records: list[Record]) -> list[One]:
    """Return the records of a file that holds one kind."""
    found = [record for record in records if isinstance(record, kind)]
    assert len(found) == len(records)
    return found


def _tasks(records: list[Record]) -> list[Demonstration | Prompt]:
    """Return the records of a file that holds demonstrations or prompts."""
    found = [record for record in records if isinstance(record, Demonstration | Prompt)]
    assert len(found) == len(records)
    return found


def _words_of(record: Demonstration | Prompt) -> set[str]:
    texts = [turn["content"] for turn in to_messages(record.prompt)]
    texts += [record.response] if isinstance(record, Demonstration) else []
    return {word for text in texts for word in split_words(text)}


def _orders(ranks: list[int]) -> Iterator[int]:
    """Return for every pair -1 if the first is better, 1 if the second is, 0 for a tie."""
    for left, right in combinations(ranks, 2):
        yield (left > right) - (left < right)
