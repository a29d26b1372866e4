"""Malformed records, settings and model folders: a clear error that names the place, or a load.

1,100 examples in the suite, always the same. FUZZ_FACTOR=10 makes it ten times as many, drawn anew.
"""

import gzip
import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf.chat import Chat
from rlhf.config import ModelSettings, keys_of, load_config
from rlhf.datasets import read_records
from rlhf.models import load_chat, load_policy, load_scalar, save_policy
from rlhf.records import RECORD_CLASSES
from rlhf.rewards import GoldenRow, RewardCard
from tests.rlhf.tiny_models import byte_tokenizer, tiny_policy_of, tiny_scalar_of
from tests.test_configs import SETTINGS, config_class_of

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
SLOWEST = timedelta(seconds=20)


def examples(number: int) -> settings:
    return settings(
        max_examples=number * FACTOR,
        derandomize=FACTOR == 1,
        deadline=SLOWEST,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


NUMBERS = st.integers(-3, 300) | st.floats() | st.sampled_from([10**30, -(2**63), 1e300])
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=6) | st.sampled_from(["role", "content"]), inner)
    ),
    max_leaves=6,
)
SMALL_VALUES = st.none() | st.booleans() | st.integers(-3, 99) | st.text(max_size=8)
"""For shapes of models: a billion layers would be built one by one."""
SMALL_VALUES = (
    SMALL_VALUES
    | st.lists(SMALL_VALUES, max_size=3)
    | st.dictionaries(st.text(max_size=3), SCALARS)
)


@st.composite
def changed_bytes(draw: st.DrawFn, data: bytes) -> bytes:
    """Cut, with bits flipped, with a part gone, or with bytes put in."""
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
    """A JSON value in which one part is another, gone, or doubled under another name."""
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


def outcome(load: Callable[[], Any], *places: str) -> Any:
    """What is loaded, or None after an error that says where; any other exception comes through."""
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


@examples(600)
@given(data=st.data(), kind=st.sampled_from(sorted(ROWS)), packed=st.booleans())
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
    records = outcome(lambda: read_records(path, record_class), str(path))
    if records is not None:
        assert all(type(record) is record_class for record in records) and records
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


@examples(150)
@given(data=st.data(), source=st.sampled_from(SETTINGS))
def test_settings_files(
    data: st.DataObject, source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config_class = config_class_of(source.parent.name)
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(data.draw(settings_files(source)))
    words = ["--config", str(path)]
    config = outcome(lambda: load_config(config_class, words), str(path), *keys_of(config_class))
    assert config is None or type(config) is config_class


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Whole folders of a policy and of a reward model."""
    folder = tmp_path_factory.mktemp("whole")
    tokenizer = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
    Chat(tokenizer)
    sizes: dict[str, Any] = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
    sizes |= {"vocab_size": len(tokenizer), "num_attention_heads": 2}
    save_policy(tiny_policy_of("llama", **sizes), tokenizer, folder / "policy")
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
    return {"policy": folder / "policy", "rm": folder / "rm"}


def spoil(data: st.DataObject, folder: Path, names: list[str]) -> None:
    """Change, remove or replace a file or two of a folder."""
    present = [name for name in names if (folder / name).exists()]
    for name in data.draw(st.lists(st.sampled_from(present), min_size=1, max_size=2, unique=True)):
        path = folder / name
        match data.draw(st.sampled_from(["tree", "tree", "tree", "bytes", "bytes", "gone", "dir"])):
            case "tree" if name.endswith(".json"):
                values = VALUES if name == "reward.json" else SMALL_VALUES
                tree = data.draw(changed_tree(json.loads(path.read_text()), values))
                path.write_bytes(json.dumps(tree).encode(errors="surrogatepass"))
            case "gone":
                path.unlink()
            case "dir":
                path.unlink()
                path.mkdir()
            case _:
                path.write_bytes(data.draw(changed_bytes(path.read_bytes())))


def copy(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(source, target))


@examples(150)
@given(data=st.data(), kind=st.sampled_from(["policy", "rm"]))
def test_model_folders(
    data: st.DataObject,
    kind: str,
    folders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = copy(folders[kind], tmp_path_factory)
    spoil(data, folder, ["config.json", "model.safetensors", "generation_config.json"])
    load: Callable[[ModelSettings], Any] = load_policy if kind == "policy" else load_scalar
    model = outcome(lambda: load(ModelSettings(path=str(folder))), str(folder))
    assert model is None or not any(one.is_meta for one in model.parameters())


@examples(100)
@given(data=st.data())
def test_tokenizer_folders(
    data: st.DataObject, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copy(folders["policy"], tmp_path_factory)
    spoil(data, folder, ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
    chat = outcome(lambda: load_chat(ModelSettings(path=str(folder))), str(folder))
    assert chat is None or chat.response_ids("a")[-1] == chat.end_id


@examples(100)
@given(data=st.data())
def test_reward_cards(
    data: st.DataObject, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = copy(folders["rm"], tmp_path_factory)
    spoil(data, folder, ["reward.json"])
    card = outcome(lambda: RewardCard.load(folder), str(folder))
    assert card is None or isinstance(card.bias + card.scale, float)
