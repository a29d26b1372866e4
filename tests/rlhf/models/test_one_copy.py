"""Converted files give the weights that every process would convert, in pages of one file."""

from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from rlhf.models import one_copy
from rlhf.models.adapters import HEAD, save_adapter
from rlhf.models.full import load_full
from rlhf.models.loading import load_policy, load_scalar
from rlhf.models.one_copy import TYPES, converted_once
from rlhf.models.saving import save_policy
from rlhf.models.settings import LoraSettings, ModelSettings
from tests.rlhf.tiny_models import byte_tokenizer, change_trained, tiny_policy_of

LORA = LoraSettings(rank=4)
TOKENIZER = byte_tokenizer("<s>", "</s>", "<pad>", eos_token="</s>", pad_token="<pad>")
FILE = "/memfd:weights"


def sharing(kind: DistributedType = DistributedType.FSDP) -> AbstractContextManager[None]:
    """Share with the second process of the machine, which is not there."""
    accelerator: Any = SimpleNamespace(
        distributed_type=kind,
        num_processes=2,
        process_index=0,
        local_process_index=0,
        is_local_main_process=True,
        wait_for_everyone=lambda: None,
    )
    return converted_once(accelerator)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(one_copy, "gather_object", lambda objects: objects)


def save(folder: Path, dtype: torch.dtype, architecture: str = "llama", **changes: Any) -> str:
    model = tiny_policy_of(architecture, vocab_size=len(TOKENIZER), **changes)
    save_policy(model.to(dtype), TOKENIZER, folder)
    return str(folder)


def shared_names(model: nn.Module) -> set[str]:
    """Return the parameters whose memory is that of a converted file."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    places = [
        range(*(int(end, 16) for end in line[0].split("-"))) for line in lines if FILE in line
    ]
    return {
        name
        for name, parameter in model.named_parameters()
        if any(parameter.data_ptr() in place for place in places)
    }


def states(model: nn.Module) -> dict[str, Any]:
    """Return all tensors, also buffers that are not saved, and which of them are tied."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return {name: (one.dtype, one.tolist(), one.requires_grad) for name, one in tensors.items()}


@pytest.mark.parametrize(("stored", "asked"), [("bfloat16", "float32"), ("float32", "bfloat16")])
@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"tie_word_embeddings": False}),
        ("llama", {"tie_word_embeddings": True}),
        ("gpt2", {}),
    ],
    ids=["llama", "tied", "gpt2"],
)
def test_weights_are_those_of_the_files(
    stored: str, asked: Any, architecture: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    path = save(tmp_path / "policy", getattr(torch, stored), architecture, **changes)
    settings = ModelSettings(path=path, dtype=asked)
    expected = load_policy(settings)
    with sharing():
        found = load_policy(settings)
    assert states(found) == states(expected)
    assert shared_names(expected) == set()
    assert shared_names(found) == set(dict(found.named_parameters()))
    is_tied = found.get_input_embeddings().weight is found.get_output_embeddings().weight
    assert is_tied == (architecture == "gpt2" or changes["tie_word_embeddings"])
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.generation_config == expected.generation_config
    named = [one for one in found.modules() if hasattr(one, "name_or_path")]
    before = [one for one in expected.modules() if hasattr(one, "name_or_path")]
    assert [one.name_or_path for one in named] == [one.name_or_path for one in before]
    assert found.config.name_or_path == path


def test_files_of_the_type_that_is_asked_for_stay_their_own_pages(tmp_path: Path) -> None:
    path = save(tmp_path / "policy", torch.float32)
    with sharing():
        found = load_policy(ModelSettings(path=path))
    assert shared_names(found) == set()
    line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if path in line)
    first, last = (int(end, 16) for end in line.split()[0].split("-"))
    assert first <= next(found.parameters()).data_ptr() < last


def test_a_policy_in_several_files(tmp_path: Path) -> None:
    model = tiny_policy_of("llama", vocab_size=len(TOKENIZER)).bfloat16()
    save_policy(model, TOKENIZER, tmp_path / "policy")
    (tmp_path / "policy/model.safetensors").unlink()
    model.save_pretrained(tmp_path / "policy", max_shard_size="20KB")
    assert len([*(tmp_path / "policy").glob("*.safetensors")]) > 2
    settings = ModelSettings(path=str(tmp_path / "policy"))
    with sharing():
        found = load_policy(settings)
    assert states(found) == states(load_policy(settings))
    assert len(shared_names(found)) == len([*found.parameters()])


def test_a_new_head_and_the_draws_after_it_are_the_same(tmp_path: Path) -> None:
    settings = ModelSettings(path=save(tmp_path / "policy", torch.bfloat16))
    torch.manual_seed(5)
    expected, next_draw = load_scalar(settings, new_head=True), torch.rand(1)
    torch.manual_seed(5)
    with sharing():
        found = load_scalar(settings, new_head=True)
    assert torch.equal(torch.rand(1), next_draw)
    assert states(found) == states(expected)
    every = set(dict(found.named_parameters()))
    assert shared_names(found) == every - {"classifier.score.weight"}


def test_adapters_stand_on_shared_bases_and_merged_ones_do_not(tmp_path: Path) -> None:
    settings = ModelSettings(path=save(tmp_path / "policy", torch.bfloat16))
    torch.manual_seed(5)
    expected = load_policy(settings, LORA)
    torch.manual_seed(5)
    with sharing():
        found = load_policy(settings, LORA)
    assert states(found) == states(expected)
    frozen = {name for name, one in found.named_parameters() if not one.requires_grad}
    assert shared_names(found) == frozen
    change_trained(expected)
    save_adapter(expected, tmp_path / "adapter")
    TOKENIZER.save_pretrained(tmp_path / "adapter")
    for lora, shared in ((LORA, frozen), (LoraSettings(), set())):
        of_adapter = ModelSettings(path=str(tmp_path / "adapter"))
        with sharing():
            found = load_policy(of_adapter, lora)
        assert states(found) == states(load_policy(of_adapter, lora))
        assert shared_names(found) == shared


def test_a_process_that_writes_changes_its_own_weights_alone(tmp_path: Path) -> None:
    settings = ModelSettings(path=save(tmp_path / "policy", torch.bfloat16))
    convert, loaded = one_copy.convert, []

    def convert_and_load(folder: Path, dtype: torch.dtype) -> int | None:
        memory = convert(folder, dtype)
        loaded.append(load_file(f"/proc/self/fd/{memory}"))
        return memory

    with pytest.MonkeyPatch.context() as patch, sharing():
        patch.setattr(one_copy, "convert", convert_and_load)
        first = load_policy(settings)
    weight, name = next(first.parameters()), next(iter(dict(first.named_parameters())))
    before = loaded[0][name].clone()
    with torch.no_grad():
        weight.add_(1.0)
    assert torch.equal(loaded[0][name], before)
    assert torch.equal(weight, before + 1.0)


@pytest.mark.parametrize("kind", ["numbers", "own code"])
def test_other_models_are_loaded_as_ever(kind: str, tmp_path: Path) -> None:
    path = save(tmp_path / "policy", torch.bfloat16)
    file = tmp_path / "policy/model.safetensors"
    if kind == "numbers":
        save_file({**load_file(file), "numbers": torch.arange(3)}, file, metadata={"format": "pt"})
    settings = ModelSettings(path=path, trust_remote_code=kind == "own code")
    with sharing():
        found = load_policy(settings)
    assert shared_names(found) == set()
    assert states(found) == states(load_policy(settings))


def test_layers_that_transformers_keeps_in_float32_are_not_rounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaPreTrainedModel, "_keep_in_fp32_modules_strict", {"input_layernorm"})
    settings = ModelSettings(path=save(tmp_path / "policy", torch.float32), dtype="bfloat16")

    def load() -> Any:
        torch.manual_seed(5)
        return load_full(AutoModelForSequenceClassification, settings, new_weights=[HEAD])

    expected, next_draw = load(), torch.rand(1)
    with sharing():
        found = load()
    assert torch.equal(torch.rand(1), next_draw)
    assert states(found) == states(expected)
    kept = {one.dtype for name, one in found.named_parameters() if "input_layernorm" in name}
    assert kept == {torch.float32}
    assert shared_names(found) == set()


def test_a_broken_file_is_named_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that finds it tells the others first, which would wait for it."""
    told: list[list[Any]] = []

    def gather(objects: list[Any]) -> list[Any]:
        told.append(objects)
        return objects

    monkeypatch.setattr(one_copy, "gather_object", gather)
    path = save(tmp_path / "policy", torch.bfloat16)
    file = tmp_path / "policy/model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with sharing(), pytest.raises(ValueError, match=f"cannot load {path}"):
        load_policy(ModelSettings(path=path))
    assert told == [[None]]


def test_a_process_that_cannot_open_the_copy_converts_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings(path=save(tmp_path / "policy", torch.bfloat16))
    monkeypatch.setattr(one_copy, "gather_object", lambda _: [str(tmp_path / "nothing")])
    with sharing():
        found = load_policy(settings)
    assert shared_names(found) == set()
    assert states(found) == states(load_policy(settings))


def test_a_hub_id_is_found_in_the_cache_if_all_its_files_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(save(tmp_path / "snapshot", torch.bfloat16))
    of_hub = ModelSettings(path="owner/name")
    monkeypatch.setattr(one_copy, "try_to_load_from_cache", lambda *_: str(folder / "config.json"))
    assert one_copy._folder_of(of_hub) == folder
    (folder / "generation_config.json").unlink()
    assert one_copy._folder_of(of_hub) is None
    monkeypatch.setattr(one_copy, "try_to_load_from_cache", lambda *_: None)
    assert one_copy._folder_of(of_hub) is None


@pytest.mark.parametrize("kind", [DistributedType.MULTI_GPU, DistributedType.DEEPSPEED])
def test_other_launchers_convert_in_each_process(kind: DistributedType, tmp_path: Path) -> None:
    settings = ModelSettings(path=save(tmp_path / "policy", torch.bfloat16))
    with sharing(kind):
        found = load_policy(settings)
    assert shared_names(found) == set()


def test_the_copy_is_gone_with_the_last_weight(tmp_path: Path) -> None:
    settings = ModelSettings(path=save(tmp_path / "policy", torch.bfloat16))
    with sharing():
        found = load_policy(settings)
    assert FILE in Path("/proc/self/maps").read_text()
    for parameter in found.parameters():
        parameter.data = parameter.data.clone()
    assert FILE not in Path("/proc/self/maps").read_text()
    open_files = [file.resolve() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    assert not [file for file in open_files if "memfd" in str(file)]


def test_every_type_of_the_settings_is_known() -> None:
    assert {"float32", "bfloat16"} <= {str(dtype).removeprefix("torch.") for dtype in TYPES}
