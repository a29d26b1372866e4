"""Loads, trains and saves LoRA adapters (Hu et al. 2021), in PEFT's file format.

A layer with an adapter computes y = W x + alpha / rank * B A x with W frozen. A folder holds one
adapter over a full model, its base. A stage that starts from an adapter trains a copy of it further
over the same base. So adapters are never stacked, nor merged between stages.

    adapter_config.json          rank, alpha, layers, and the path of the base
    adapter_model.safetensors    A and B of every layer, and the head of a reward model
    base.json                    SHA-256 of the base's weights, compared at every load

PEFT is imported by the functions that need it. With bitsandbytes, which it imports, it would take a
fifth of the time in which a stage without adapters starts.
"""

import copy
import functools
import hashlib
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file, extract_commit_hash

from rlhf.models.architectures import body_of
from rlhf.models.compat import forget_adapter
from rlhf.models.settings import LoraSettings
from rlhf.runs.lineage import BASE_FILE

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
HEAD = "score.weight"

_NAME = "default"
"""PEFT's name for the only adapter of a model."""
_LAYER = re.compile(rf"\.lora_[AB]\.{_NAME}\.weight$")
_PREFIX = "base_model.model."
"""Prefix that PEFT gives every name in a file."""
_READ = {
    "base_model_name_or_path",
    "peft_type",
    "task_type",
    "r",
    "lora_alpha",
    "target_modules",
    "modules_to_save",
}
_UNUSED = {
    "auto_mapping",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "lora_dropout",
    "peft_version",
    "revision",
}
"""Fields of adapter_config.json that do not change what a loaded adapter computes."""
_HARMLESS_STARTS = (True, False, "gaussian")
"""Values of init_lora_weights that leave the base's weights unchanged."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter as its folder describes it."""

    base: str
    """Folder or hub id of the full model."""
    base_sha256: str | None
    """`weights_sha256` of the base. None means not recorded: another program made the adapter."""
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    has_head: bool
    """Whether it belongs to a reward model and includes the head."""


def find_adapter(path: str) -> Adapter | None:
    """Return a folder's adapter after checking its base's hash; None if it holds a full model.

    Raises:
        ValueError: It is not a plain LoRA adapter, or its base has other weights than in training.
        OSError: The base does not exist.
    """
    if not (Path(path) / CONFIG_FILE).is_file():
        return None
    adapter = read_adapter(path)
    try:
        found = weights_sha256(adapter.base)
    except (OSError, ValueError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"{path} is an adapter without its base: {error}") from error
    if adapter.base_sha256 is None:
        warnings.warn(
            f"{path} holds no {BASE_FILE}, so nobody can tell whether {adapter.base} has the "
            "weights that this adapter was trained over",
            stacklevel=3,
        )
        return adapter
    if found != adapter.base_sha256:
        raise ValueError(
            f"{path} is an adapter over weights with SHA-256 {adapter.base_sha256}, but its base "
            f"{adapter.base} has {found}; put the base back, or train the adapter again over it"
        )
    return adapter


def read_adapter(folder: str | Path) -> Adapter:
    """Read a folder's adapter without checking its base.

    Raises:
        ValueError: It is not a LoRA adapter, or has more than A and B.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        return _parse(_read_json(path), _read_base(Path(folder) / BASE_FILE))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a LoRA adapter that can be used: {error}; give a folder that a stage "
            "wrote, or merge the adapter where it was made"
        ) from error


def weights_sha256(path: str) -> str:
    """Return the SHA-256 of a full model's weights; for a hub id, its commit.

    It is that of `cat *.safetensors | sha256sum` in the model's folder.

    Raises:
        ValueError: The folder holds no safetensors file, or is an adapter itself.
        OSError: There is no such folder or hub id.
    """
    folder = Path(path)
    if not folder.exists():
        try:
            return f"hub commit {extract_commit_hash(cached_file(path, 'config.json'), None)}"
        except (OSError, ValueError) as error:
            raise OSError(
                f"{path} is not a folder here, and cannot be read as a hub id: {error}; if the "
                "path is a relative one, start the program in the folder that it starts from"
            ) from error
    if (folder / CONFIG_FILE).exists():
        raise ValueError(f"{path} is an adapter itself; adapters are not stacked, merge it first")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{path} holds no *.safetensors file, so it cannot be the base of an adapter"
        )
    states = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return _sha256(tuple(files), tuple(states))


def new_adapter(model: PreTrainedModel, base: str, settings: LoraSettings) -> None:
    """Freeze a full model and add a new adapter to it.

    A is random, from torch's generator. B is 0, so the model computes what it did before.

    Args:
        base: Path of the model, as the adapter will record it.

    Raises:
        ValueError: target_modules names no layer, or layers that cannot have an adapter.
    """
    _inject(model, _adapter_over(model, base, weights_sha256(base), settings))


def empty_adapter(
    model: PreTrainedModel, base: str, settings: LoraSettings, adapter: Adapter | None = None
) -> None:
    """Add an adapter to a model without data, reading no weights.

    It replaces load_adapter if `adapter` is given, otherwise new_adapter."""
    # PEFT moves its new tensors, and fake tensors cannot be moved, but meta tensors can.
    with torch.device("meta"):
        _inject(model, adapter or _adapter_over(model, base, None, settings))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                empty = nn.Parameter(torch.empty_like(parameter, device=model.device))
                setattr(module, name, empty)


def load_adapter(
    model: PreTrainedModel, folder: str, adapter: Adapter, *, new_head: bool = False
) -> None:
    """Freeze a base and add the adapter of a folder to it, to be trained further or only used.

    Args:
        new_head: Whether to leave out the folder's head, if it has one.

    Raises:
        ValueError: Weights are missing, unknown, or have another shape.
    """
    _inject(model, adapter)
    path = Path(folder) / WEIGHTS_FILE
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read ({error}); run the stage that makes it") from error
    expected = adapter_weights(model)
    if new_head:
        for weights in (found, expected):
            weights.pop(_PREFIX + HEAD, None)
    shapes, found_shapes = _shapes(expected), _shapes(found)
    if shapes != found_shapes:
        wrong = sorted(dict(set(shapes.items()) ^ set(found_shapes.items())))
        raise ValueError(
            f"{path} does not fit {adapter.base} at {', '.join(wrong[:5])}: weights are missing, "
            "unknown or of another shape; the folder is incomplete or of another model"
        )
    with torch.no_grad():
        for name, weight in expected.items():
            weight.copy_(found[name])


def check_same(folder: str, adapter: Adapter, settings: LoraSettings) -> None:
    """Refuse settings that describe another adapter than the one in the folder."""
    pairs: list[tuple[str, Any, Any]] = [
        ("rank", settings.rank, adapter.rank),
        ("alpha", settings.alpha, adapter.alpha),
    ]
    if settings.target_modules != "all-linear":
        wanted = sorted(settings.target_modules)
        pairs.append(("target_modules", wanted, sorted(adapter.target_modules)))
    for name, wanted, found in pairs:
        if wanted != found:
            raise ValueError(
                f"lora.{name} is {wanted}, but {folder} holds an adapter with {found}, which would "
                f"be trained on; give {found}, or start from a full model (python -m tools.export "
                "merges an adapter into one)"
            )


def merge_adapter(model: PreTrainedModel) -> None:
    """Replace W by W + alpha / rank * B A and remove the adapter; all weights become trainable.

    Do not use it on a model that shares its weights with others: theirs would change too.
    """
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    del model.peft_config
    del model.__dict__["lora_adapter"]
    forget_adapter(model)
    model.requires_grad_(True)


def adapter_of(model: nn.Module) -> Adapter | None:
    """Return the adapter that a model has; None if it has none."""
    return getattr(model, "lora_adapter", None)


def adapter_weights(
    model: PreTrainedModel, state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return A and B of every layer and a classifier's head, by their names in a file.

    Args:
        state: The model's state dict if it had to be gathered. None means the model's own.
    """
    state = model.state_dict() if state is None else state
    return {
        _PREFIX + name.replace(f".{_NAME}.", "."): weight
        for name, weight in state.items()
        if _is_trained(name)
    }


def save_adapter(
    model: PreTrainedModel, folder: str | Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write the adapter's three files (listed at the top of this module).

    Args:
        state: As in `adapter_weights`.
    """
    adapter = adapter_of(model)
    assert adapter is not None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = adapter_weights(model, state)
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    config: Any = copy.copy(model.peft_config[_NAME])
    config.base_model_name_or_path = adapter.base
    config.inference_mode = True
    config.modules_to_save = ["score"] if adapter.has_head else None
    config.save_pretrained(folder)
    base = {"path": adapter.base, "sha256": adapter.base_sha256}
    (folder / BASE_FILE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")


def _adapter_over(
    model: PreTrainedModel, base: str, base_sha256: str | None, settings: LoraSettings
) -> Adapter:
    return Adapter(
        base=base,
        base_sha256=base_sha256,
        rank=settings.rank,
        alpha=settings.alpha,
        target_modules=tuple(_targets(model, settings)),
        has_head=hasattr(model, "score"),
    )


def _inject(model: PreTrainedModel, adapter: Adapter) -> None:
    """Replace layers by LoRA layers inside the model, so that other code sees the same model."""
    from peft import LoraConfig

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        target_modules=list(adapter.target_modules),
        task_type="SEQ_CLS" if hasattr(model, "score") else "CAUSAL_LM",
    )
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2's; PEFT corrects it
        model.add_adapter(config)
    # torch's annotations allow only tensors and modules as attributes of a module.
    model.__dict__["lora_adapter"] = adapter
    for name, parameter in model.named_parameters():
        if _is_trained(name):
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)


def _targets(model: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """Return the last part of the names of the linear layers that get an adapter."""
    body = body_of(model)
    linear = [n for n, m in body.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    known = {name.rpartition(".")[2] for name in linear}
    if settings.target_modules == "all-linear":
        return sorted(known)
    unknown = sorted(set(settings.target_modules) - known)
    if unknown:
        raise ValueError(
            f"lora.target_modules names {', '.join(unknown)}; the linear layers of this model are "
            f"{', '.join(sorted(known))} (the output layer is none of them: a reward model has no "
            "such layer, and takes the same adapter)"
        )
    return list(settings.target_modules)


def _is_trained(name: str) -> bool:
    return name == HEAD or _LAYER.search(name) is not None


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _read_json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise ValueError("it does not hold an object")
    return values


def _read_base(path: Path) -> str | None:
    if not path.is_file():
        return None
    digest = _read_json(path).get("sha256")
    if not isinstance(digest, str):
        raise ValueError(f"{path.name} has no sha256")
    return digest


def _parse(values: Mapping[str, Any], base_sha256: str | None) -> Adapter:
    if values.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {values.get('peft_type')!r} and not LORA")
    from peft import LoraConfig

    plain = asdict(LoraConfig())
    for name, value in values.items():
        if name not in _READ | _UNUSED and value and value != plain.get(name):
            raise ValueError(f"{name} is {value!r}, which this program does not know how to train")
    if values.get("init_lora_weights", True) not in _HARMLESS_STARTS:
        raise ValueError(f"init_lora_weights {values['init_lora_weights']!r} changes the base too")
    base, rank = values.get("base_model_name_or_path"), values.get("r")
    alpha: Any = values.get("lora_alpha")
    targets, saved = values.get("target_modules"), values.get("modules_to_save") or []
    if not isinstance(base, str) or not base.strip():
        raise ValueError(f"base_model_name_or_path is {base!r}")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"r is {rank!r}")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise ValueError(f"lora_alpha is {alpha!r}")
    if not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"target_modules is {targets!r} and not a list of names")
    if not targets:
        raise ValueError("target_modules is empty")
    if not isinstance(saved, list) or not {"score", "classifier"}.issuperset(map(str, saved)):
        raise ValueError(f"modules_to_save is {saved!r}")
    return Adapter(
        base=base,
        base_sha256=base_sha256,
        rank=rank,
        alpha=float(alpha),
        target_modules=tuple(targets),
        has_head=values.get("task_type") == "SEQ_CLS",
    )


@functools.cache
def _sha256(files: tuple[Path, ...], states: tuple[tuple[int, int], ...]) -> str:
    """Hash the files' contents. `states` (sizes and times) only detect that a file changed."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):  # 4 MiB
                digest.update(block)
    return digest.hexdigest()
