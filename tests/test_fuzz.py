"""Malformed records, settings and folders give an error that names the place, or a valid load.

The suite has 1,290 examples, always the same. FUZZ_FACTOR=10 draws ten times as many new ones.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.inputs.chat import Chat
from rlhf.inputs.files import read_records
from rlhf.inputs.records import RECORD_CLASSES
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from rlhf.models.tokenizers import load_chat
from rlhf.rewards.models import GoldenRow, RewardCard
from rlhf.runs.checkpoint_files import (
    check_files,
    check_shard,
    finish_checkpoint,
    read_manifest,
    read_shard,
    read_states,
    start_checkpoint,
    write_shard,
)
from rlhf.runs.settings import keys_of, load_config
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of, tiny_scalar_of
from tests.test_configs import SETTINGS, config_class_of

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))


def examples(number: int) -> settings:
    return settings(
        max_examples=number * FACTOR,
        derandomize=FACTOR == 1,
        deadline=timedelta(seconds=20),
        database=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.integers(-3, 300) | st.floats() | st.sampled_from([10**30, -(2**63), 10**400])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["role", "content"]), inner)
    ),
    max_leaves=6,
)
SMALL = st.none() | st.booleans() | st.integers(-3, 99) | st.text(max_size=8)
SMALL_VALUES = SMALL | st.lists(SMALL, max_size=3) | st.dictionaries(st.text(max_size=3), SCALARS)
"""Values for shapes of models, since a billion layers would be built one by one."""


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Draw bytes that are cut, have a flipped bit, lack a part, or have more bytes inserted."""
    spoilt = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, max(len(spoilt) - 1, 0)))
        match draw(st.sampled_from(["cut", "flip", "remove", "insert"])):
            case "cut":
                del spoilt[place:]
            case "flip" if spoilt:
                spoilt[place] ^= 1 << draw(st.integers(0, 7))
            case "remove":
                del spoilt[place : place + draw(st.integers(1, 50))]
            case "insert":
                spoilt[place:place] = draw(st.binary(max_size=8))
    return bytes(spoilt)


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """Draw a JSON value in which one part is replaced, removed, renamed or added."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 4)):
        key = draw(st.sampled_from(sorted(tree)))
        match draw(st.sampled_from(["change", "change", "change", "remove", "rename", "add"])):
            case "change":
                return {**tree, key: draw(changed_tree(tree[key], values))}
            case "remove":
                return {name: value for name, value in tree.items() if name != key}
            case "rename":
                return {(f"{key}s" if name == key else name): tree[name] for name in tree}
            case _:
                return {**tree, draw(st.text(max_size=6)): draw(values)}
    if isinstance(tree, list) and tree and draw(st.integers(0, 2)):
        place = draw(st.integers(0, len(tree) - 1))
        return [*tree[:place], draw(changed_tree(tree[place], values)), *tree[place + 1 :]]
    return draw(values)


def outcome(load: Callable[[], Any], places: Sequence[str]) -> Any:
    """Return what is loaded, or None after an error that says where; raise all other exceptions."""
    try:
        return load()
    except (ValueError, OSError) as error:
        message = str(error)
        assert any(place in message for place in places), message
        assert len(message) < 5000
        return None


MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
ROWS: dict[str, list[dict[str, Any]]] = {
    "demonstration": [{"prompt": "q", "response": "a"}, {"prompt": MESSAGES, "response": ""}],
    "ranking": [
        {"prompt": "q", "responses": ["a", "b"], "ranks": [1, None], "source": "s"},
        {"prompt": "q", "responses": ["a", "b"], "probabilities": [[0, 1, 0.5]], "weight": 2},
    ],
    "prompt": [{"prompt": "q", "meta": {"a": [1, {}]}}, {"prompt": MESSAGES}],
    "text": [{"text": "words"}],
}


@st.composite
def record_files(draw: st.DrawFn, kind: str) -> bytes:
    row = draw(st.sampled_from(ROWS[kind]))
    rows = [*ROWS[kind], draw(changed_tree(row))]
    text = "".join(json.dumps(one, ensure_ascii=draw(st.booleans())) + "\n" for one in rows)
    data = text.encode(errors="surrogatepass")
    return draw(changed_bytes(data)) if draw(st.booleans()) else data


@examples(700)
@given(data=st.data(), kind=st.sampled_from(sorted(ROWS)), packed=st.booleans())
@pytest.mark.slow
def test_record_files(
    data: st.DataObject, kind: str, packed: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    content = data.draw(record_files(kind))
    if packed:
        content = gzip.compress(content, mtime=0)
        content = data.draw(changed_bytes(content)) if data.draw(st.booleans()) else content
    path = tmp_path_factory.getbasetemp() / ("fuzz.jsonl.gz" if packed else "fuzz.jsonl")
    path.write_bytes(content)
    record_class = RECORD_CLASSES[kind]
    records = outcome(lambda: read_records(path, record_class), [str(path)])
    if records is not None:
        assert records and all(type(record) is record_class for record in records)
        assert [record_class.from_row(record.to_row()) for record in records] == records


@cache
def settings_tree(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@st.composite
def settings_files(draw: st.DrawFn, path: Path) -> bytes:
    if draw(st.integers(0, 3)) == 0:
        return draw(changed_bytes(path.read_bytes()))
    tree = draw(changed_tree(settings_tree(path)))
    text = yaml.safe_dump(tree, allow_unicode=draw(st.booleans()), sort_keys=False)
    return text.encode(errors="surrogatepass")


@examples(80)
@given(data=st.data(), source=st.sampled_from(SETTINGS))
@pytest.mark.slow
def test_settings_files(
    data: st.DataObject, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config_class = config_class_of(source.parent.name)
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data.draw(settings_files(source)))
    words = ["--config", str(path)]
    config = outcome(lambda: load_config(config_class, words), [str(path), *keys_of(config_class)])
    assert config is None or type(config) is config_class


STATES: dict[str, dict[str, Any]] = {
    "model": {"weight": torch.arange(6.0)},
    "monitor": {"history": [0.5, None]},
}
SHARD: dict[str, dict[str, Any]] = {
    "zero": {"weights": {"0": torch.arange(4.0)}, "groups": [{"lr": 0.1}]}
}


def of_model(folder: Path) -> ModelSettings:
    return ModelSettings(path=str(folder))


def load_checkpoint(folder: Path) -> dict[str, dict[str, Any]]:
    check_files(folder, read_manifest(folder))
    check_shard(folder, 0)
    return {**read_states(folder), **read_shard(folder, 0)}


def has_all_weights(model: torch.nn.Module) -> bool:
    return not any(parameter.is_meta for parameter in model.parameters())


def ends_responses(chat: Chat) -> bool:
    return chat.response_ids("a")[-1] == chat.end_id


def has_numbers(card: RewardCard) -> bool:
    numbers = (card.bias, card.scale, card.pair_accuracy, *card.interval, card.golden[0].score)
    return all(abs(float(number)) < float("inf") for number in numbers)


def is_as_written(states: dict[str, dict[str, Any]]) -> bool:
    weight = states["model"]["weight"]
    shard = states["zero"]["weights"]["0"]
    return (
        torch.equal(weight, STATES["model"]["weight"])
        and torch.equal(shard, SHARD["zero"]["weights"]["0"])
        and states["monitor"] == STATES["monitor"]
        and states["zero"]["groups"] == SHARD["zero"]["groups"]
    )


@dataclass(frozen=True)
class Kind:
    """Describes a kind of folder that is loaded."""

    folder: str
    files: Sequence[str]
    """The files that are spoilt."""
    load: Callable[[Path], Any]
    is_valid: Callable[[Any], bool]
    """Returns whether what was loaded is valid."""
    values: st.SearchStrategy[Any] = VALUES
    """Values that are put into its JSON files."""


CONFIG, WEIGHTS = "config.json", "model.safetensors"
KINDS = {
    "reward card": Kind("rm", ["reward.json"], RewardCard.load, has_numbers),
    "checkpoint": Kind(
        "step-3",
        ["manifest.json", "state.json", WEIGHTS, "rank-0.json", "rank-0.safetensors"],
        load_checkpoint,
        is_as_written,
    ),
    "tokenizer": Kind(
        "policy",
        ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"],
        lambda folder: load_chat(of_model(folder)),
        ends_responses,
        SMALL_VALUES,
    ),
    "policy": Kind(
        "policy",
        [CONFIG, WEIGHTS, "generation_config.json"],
        lambda folder: load_policy(of_model(folder)),
        has_all_weights,
        SMALL_VALUES,
    ),
    "reward model": Kind(
        "rm",
        [CONFIG, WEIGHTS],
        lambda folder: load_scalar(of_model(folder)),
        has_all_weights,
        SMALL_VALUES,
    ),
    "adapter": Kind(
        "adapter",
        ["adapter_config.json", "adapter_model.safetensors", "base.json"],
        lambda folder: load_policy(of_model(folder)),
        has_all_weights,
    ),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write faultless folders by their names in `KINDS`."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    Chat(tokenizer)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"vocab_size": len(tokenizer), "num_attention_heads": 2}
    save_policy(tiny_policy_of("llama", **sizes), tokenizer, folder / "policy")
    adapted = load_policy(of_model(folder / "policy"), LoraSettings(rank=2))
    save_policy(adapted, tokenizer, folder / "adapter")
    tiny_scalar_of("llama", **sizes).save(folder / "rm", tokenizer)
    RewardCard(
        bias=0.5,
        scale=1.0,
        pair_accuracy=0.7,
        interval=(0.6, 0.8),
        golden=(GoldenRow(prompt="q", response="a", score=0.1),),
        template_hash="t",
        rendering_hash="r",
    ).save(folder / "rm")
    run = {"stage": "ppo", "settings": {"seed": 0}}
    start_checkpoint(folder / "step-3")
    shards = write_shard(folder / "step-3", 0, SHARD)
    finish_checkpoint(
        folder / "step-3",
        STATES,
        step=3,
        seconds=1.5,
        num_processes=1,
        run=run,
        shards=shards,
    )
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_whole_folders_load(name: str, whole: Path) -> None:
    """Otherwise the next test would pass with a loader that refuses everything."""
    kind = KINDS[name]
    assert kind.is_valid(kind.load(whole / kind.folder))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("reward card", 150),
        ("checkpoint", 150),
        ("tokenizer", 60),
        ("policy", 50),
        ("reward model", 50),
        ("adapter", 50),
    ],
)
@pytest.mark.slow
def test_spoilt_folders(name: str, number: int, whole: Path, tmp_path: Path) -> None:
    kind = KINDS[name]
    folder = tmp_path / kind.folder

    @examples(number)
    @given(data=st.data())
    def load_spoilt(data: st.DataObject) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole / kind.folder, folder)
        chosen = st.lists(st.sampled_from(kind.files), min_size=1, max_size=2, unique=True)
        for file in data.draw(chosen):
            spoil(data, folder / file, kind.values)
        loaded = outcome(lambda: kind.load(folder), [str(folder)])
        assert loaded is None or kind.is_valid(loaded)

    load_spoilt()


def spoil(data: st.DataObject, path: Path, values: st.SearchStrategy[Any]) -> None:
    """Change, remove or replace a file."""
    match data.draw(st.sampled_from(["tree", "tree", "tree", "bytes", "bytes", "gone", "folder"])):
        case "tree" if path.suffix == ".json":
            tree = data.draw(changed_tree(json.loads(path.read_text(encoding="utf-8")), values))
            path.write_text(json.dumps(tree), encoding="utf-8")
        case "gone":
            path.unlink()
        case "folder":
            path.unlink()
            path.mkdir()
        case _:
            path.write_bytes(data.draw(changed_bytes(path.read_bytes())))
