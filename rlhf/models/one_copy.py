"""Converts a model's files once for all processes of a machine.

If the files have the type that is asked for, the loaded weights stay pages of the files, which all
processes share. If not, every process converts them into memory of its own. Inside
`converted_once` only the first process of each machine does so. It writes the converted weights,
in safetensors' format, into an anonymous file in memory (memfd). Then all processes load this file
in place of the model's own. They map its pages privately, so a process that writes to a page gets a
copy of it. The memory is free as soon as no process maps the file.

What this cannot do is loaded as ever: a model with its own code, weights in other types than those
of TYPES, a model of the hub that is not yet in the cache, and systems without memfd.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from rlhf.models.settings import ModelSettings

TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Types that can be converted into each other, and their names in safetensors' header."""

_at_work: list[Accelerator] = []
"""The innermost `converted_once`, last."""


@contextmanager
def converted_once(accelerator: Accelerator) -> Iterator[None]:
    """Convert the files of every full model that is loaded inside once a machine.

    All processes must load the same models inside, in the same order. Only FSDP2 profits: it copies
    its shards out of the pages. Under other launchers nothing changes, since training on a CPU
    would write to the pages, and copy them again.
    """
    is_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if not is_fsdp or accelerator.num_processes == 1:
        yield
        return
    _at_work.append(accelerator)
    try:
        yield
    finally:
        _at_work.pop()


def load_once(
    settings: ModelSettings,
    load: Callable[[str], tuple[Any, dict[str, Any]]],
    *,
    is_shared: bool = True,
) -> tuple[Any, dict[str, Any]]:
    """Return load(path) with the path of a full model, or inside `converted_once` of its copy.

    Args:
        load: Returns a model, and the report of its loading.
        is_shared: Whether the copy may be used. If not, every process converts the files.
    """
    if not (is_shared and _at_work):
        return load(settings.path)
    generator = torch.get_rng_state()
    with _files(settings) as path:
        model, report = load(path)
    if path == settings.path:
        return model, report
    dtype = getattr(torch, settings.dtype)
    if any(w.is_floating_point() and w.dtype != dtype for w in model.state_dict().values()):
        # transformers keeps some layers of this model in float32, but the copy has rounded them.
        torch.set_rng_state(generator)
        return load(settings.path)
    parts: list[Any] = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
    for named in (*parts, *(part.config for part in parts)):
        if named.name_or_path == path:
            named.name_or_path = settings.path
    return model, report


@contextmanager
def _files(settings: ModelSettings) -> Iterator[str]:
    """Yield the path from which to load a full model: its own, or a folder of converted files."""
    with _opened(_at_work[-1], settings) as (folder, weights):
        if folder is None or weights is None:
            yield settings.path
            return
        with TemporaryDirectory(prefix="converted-") as links:
            replaced = {SAFE_WEIGHTS_INDEX_NAME, *(file.name for file in weight_files(folder))}
            for entry in folder.iterdir():
                if entry.name not in replaced:
                    (Path(links) / entry.name).symlink_to(entry.absolute())
            (Path(links) / SAFE_WEIGHTS_NAME).symlink_to(f"/proc/self/fd/{weights}")
            yield links


@contextmanager
def _opened(
    accelerator: Accelerator, settings: ModelSettings
) -> Iterator[tuple[Path | None, int | None]]:
    """Yield a model's folder and the descriptor of its converted weights, in every process.

    Either is None where there is nothing to load but the model's own files."""
    folder, own, found = _folder_of(settings), None, None
    if accelerator.is_local_main_process and folder is not None:
        # An error is not raised here: the loading of the model's own files will say more.
        with suppress(OSError, ValueError, KeyError, RuntimeError, SafetensorError):
            own = convert(folder, getattr(torch, settings.dtype))
    try:
        places = gather_object([None if own is None else f"/proc/{os.getpid()}/fd/{own}"])
        place = places[accelerator.process_index - accelerator.local_process_index]
        if place is not None:
            with suppress(OSError):
                found = os.open(place, os.O_RDONLY)
        accelerator.wait_for_everyone()  # the first process closes its own, which others open
    finally:
        if own is not None:
            os.close(own)
    try:
        yield folder, found
    finally:
        if found is not None:
            os.close(found)


def _folder_of(settings: ModelSettings) -> Path | None:
    """Return the folder of a model's files; None if what it holds may not be all that is loaded."""
    if settings.trust_remote_code:  # transformers would take a copy of the code for other code
        return None
    if Path(settings.path).is_dir():
        return Path(settings.path)
    config = try_to_load_from_cache(settings.path, "config.json")
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if (folder / "generation_config.json").exists() else None


def weight_files(folder: Path) -> list[Path]:
    """Return the files with the weights that transformers would load from a folder."""
    if (folder / SAFE_WEIGHTS_NAME).exists():
        return [folder / SAFE_WEIGHTS_NAME]
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if not index.exists():
        return []
    names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
    return [folder / name for name in sorted(set(names))]


def convert(folder: Path, dtype: torch.dtype) -> int | None:
    """Write a folder's weights in another type into a file in memory; return its descriptor.

    Returns:
        None if there is nothing to convert, or it cannot be converted.

    Raises:
        OSError, SafetensorError: A file cannot be read.
    """
    files = weight_files(folder)
    shapes: dict[str, list[int]] = {}
    types: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # it is no mapping
                one = opened.get_slice(name)
                shapes[name] = one.get_shape()
                types.add(one.get_dtype())
    is_known = types <= set(TYPES.values())
    if types <= {TYPES[dtype]} or not is_known or not hasattr(os, "memfd_create"):
        return None
    header, ends = _header(shapes, dtype)
    size = len(header) + max(ends.values())
    memory = os.memfd_create("weights")
    try:
        os.write(memory, header)
        os.ftruncate(memory, size)
        pages = torch.from_file(f"/proc/self/fd/{memory}", True, size, dtype=torch.uint8)
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    weight = opened.get_tensor(name)
                    end = len(header) + ends[name]
                    place = pages[end - weight.numel() * dtype.itemsize : end]
                    place.view(dtype).view(weight.shape).copy_(weight)
    except BaseException:
        os.close(memory)
        raise
    return memory


def _header(shapes: dict[str, list[int]], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """Return the head of a safetensors file, and where each weight ends after it."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    ends: dict[str, int] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": TYPES[dtype], "shape": shape, "data_offsets": [start, end]}
        ends[name] = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)  # weights must begin at a multiple of their size
    return len(text).to_bytes(8, "little") + text, ends
