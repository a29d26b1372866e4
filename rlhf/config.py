"""Settings: one loader for all programs, and the sections that several stages share."""

import dataclasses
import difflib
import math
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from rlhf.records import show

Config = TypeVar("Config")

_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: (--[^\s=]+)")
_STRAY_WORD = re.compile(r"unrecognized arguments: (\S+)")
_UNION = re.compile(r"Does not validate .*Subtypes: \[(.*?)\] Errors:.*Given value: (.*)")
_CLASS = re.compile(r"<class '(?:NoneType'>|(\w+)'>)")
_KEY = re.compile(r'Parser key "([\w.]+)": (.*)')
_NOT_ACCEPTED = re.compile(r"Option '(.*?)' is not accepted")

OWN_NAME = "NAME"
"""Stands in `keys_of` for the names that a user gives to the sections of a mapping."""


class ConfigError(ValueError):
    """Settings that cannot be used; the message names the key, the value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class MayOverwrite:
    """Settings of a program that writes a folder."""

    overwrite: bool = False
    """Replace what a run of other settings, or other data, left in the folder to write. Files that
    no program of this project wrote stay in any case."""


Attention = Literal["sdpa", "eager", "flash_attention_2"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model to load and how to hold it."""

    path: str
    """Model: a local folder, a hub id, or a .gguf file."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights. Keep float32 for what is trained: at RLHF's learning rates bfloat16
    weights hardly move."""
    attention: Attention = "sdpa"
    """Attention implementation. One that cannot take a packing mask costs one row a response."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for sources that you trust."""

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("path is empty; give a model folder, a hub id or a .gguf file")


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Train a low-rank adapter over frozen weights instead of all of them (Hu et al. 2021).

    There is no dropout: with it the first ratio of PPO would not be 1.
    """

    rank: int = 0
    """Rank of the adapter; 0 trains all weights. A model folder that is an adapter already is
    trained on if it has this rank, and merged into its base with 0."""
    alpha: float = 16.0
    """The adapter's output is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the linear layers that get an adapter, such as [q_proj, v_proj]; all-linear: every
    one but the output layer, or those of the adapter that is trained on."""
    quantize: Literal["none", "4bit"] = "none"
    """How the frozen weights are held: as model.dtype says, or in 4 bits (QLoRA, Dettmers et al.
    2023), which needs the package bitsandbytes."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, "rank", self.rank, "give 0 (all weights) or more, such as 16")
        _require(
            0 < self.alpha < math.inf, "alpha", self.alpha, "give a positive number, such as 16"
        )
        if not self.target_modules:
            raise ValueError("target_modules is empty; name linear layers, or give all-linear")
        if self.quantize != "none" and self.rank == 0:
            raise ValueError(
                f"quantize is {self.quantize} and rank is 0; quantised weights cannot be trained, "
                "only an adapter over them; give a rank, such as 16"
            )


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """AdamW, its learning rate schedule and the gradient clip."""

    learning_rate: float = 1e-5
    """Peak learning rate, reached after the warm-up."""
    matrix_learning_rate: float | None = None
    """Peak learning rate of Muon, which then moves the matrices between embedding and head, such as
    0.02 for a model from scratch. None means that AdamW moves all weights. Not with weights in
    shards."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up, down to min_lr_ratio on the last step."""
    warmup_steps: int = 0
    """Optimizer steps in which the learning rate rises linearly from min_lr_ratio of its peak to
    its peak."""
    min_lr_ratio: float = 0.1
    """Learning rate on the first step of a warm-up, and on the last step unless the schedule is
    constant, as a share of the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of Adam's first and second moment."""
    eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay on matrices; biases and norm weights are left out."""
    max_grad_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it. .inf means no clip."""

    def __post_init__(self) -> None:
        _require(
            0 < self.learning_rate < math.inf,
            "learning_rate",
            self.learning_rate,
            "give a positive number, such as 1e-5",
        )
        _require(
            self.matrix_learning_rate is None or 0 < self.matrix_learning_rate < math.inf,
            "matrix_learning_rate",
            self.matrix_learning_rate,
            "give a positive number, such as 0.02, or null for AdamW alone",
        )
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "give 0 or more steps")
        _require(0 <= self.min_lr_ratio <= 1, "min_lr_ratio", self.min_lr_ratio, "give 0 to 1")
        _require(
            all(0 <= beta < 1 for beta in self.betas),
            "betas",
            list(self.betas),
            "give two numbers from 0 to below 1, such as [0.9, 0.95]",
        )
        _require(self.eps > 0, "eps", self.eps, "give a positive number, such as 1e-8")
        _require(self.weight_decay >= 0, "weight_decay", self.weight_decay, "give 0 or more")
        _require(
            self.max_grad_norm > 0,
            "max_grad_norm",
            self.max_grad_norm,
            "give a positive number, such as 1.0, or .inf for no clip",
        )


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """How responses are sampled; changes no result but by floating point and the order of draws."""

    engine: Literal["hf", "continuous", "auto", "vllm"] = "hf"
    """hf: our own loop over the model's cache. continuous: continuous batching of transformers,
    where ended responses make room for waiting prompts; for many more prompts than batch_size.
    auto: the faster of the two, timed on the first prompts. vllm: vLLM on the GPU that trains,
    given the weights before every rollout; not yet tried out."""
    batch_size: int = 64
    """Responses sampled side by side on each process; bounds the memory of the KV cache."""
    vllm_memory_share: float = 0.3
    """Share of the GPU's memory that vllm takes, for its copy of the weights and its cache."""

    def __post_init__(self) -> None:
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "give 1 or more")
        share = self.vllm_memory_share
        _require(0 < share < 1, "vllm_memory_share", share, "give a number in (0, 1), such as 0.3")


def load_config(config_class: type[Config], args: Sequence[str] | None = None) -> Config:
    """Settings from the dataclass's defaults, then --config files in their order, then options.

    Args:
        config_class: A frozen, keyword-only dataclass with an attribute docstring for each field.
        args: Command line words; None means those of this process.

    Raises:
        ConfigError: An unknown key (named, with the nearest known one), a wrong type, a missing
            key, an unreadable file, or what `__post_init__` refused.
    """
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        usage=f"{_program()} [--config FILE]... [--KEY VALUE]...",
        description=config_class.__doc__,
        allow_abbrev=False,  # otherwise --learn would be taken for --learning_rate
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with settings; may be given more than once, later files win.",
    )
    parser.add_class_arguments(config_class, as_group=False)
    words = _with_values(sys.argv[1:] if args is None else args, config_class)
    for path in config_files(words):
        _check_file(path, config_class)
    _refuse_section_files(_pairs(words), config_class)
    try:
        values = parser.parse_args(words)
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), config_class)) from error
    values.pop("config")
    values = _at_home(values)
    _check_sections(config_class, values)
    return config_class(**vars(parser.instantiate(values)))


class _Parser(ArgumentParser):
    """Reads settings files as UTF-8; the library reads them in the locale's encoding."""

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        text = Path(path).read_text(encoding="utf-8")
        return self.parse_string(text, os.path.basename(path), *args, **kwargs)


def keys_of(config_class: type) -> list[str]:
    """All keys of a settings class, those of its sections dotted: `seed`, `optim.learning_rate`.

    Sections that the user names have NAME in their place: `reward.parts.NAME.weight`.
    """
    keys = []
    for name, kind in _field_types(config_class).items():
        keys.append(name)
        if _is_section(kind):
            keys += [f"{name}.{key}" for key in keys_of(kind)]
        elif section := _named_section(kind):
            keys += [f"{name}.{OWN_NAME}"]
            keys += [f"{name}.{OWN_NAME}.{key}" for key in keys_of(section)]
    return keys


def _at_home(value: Any, key: str = "") -> Any:
    """Settings whose texts that begin with `~` are paths below the home folder; no other text of
    any setting begins with it."""
    if isinstance(value, str):
        return _home_path(value, key)
    if isinstance(value, Namespace):
        return Namespace(**_at_home(vars(value), key))
    if isinstance(value, dict):
        return {name: _at_home(one, f"{key}.{name}".lstrip(".")) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_at_home(one, key) for one in value)
    return value


def _home_path(path: str, key: str) -> str:
    """A path whose `~` or `~name` at the beginning is the home folder; all else as it is."""
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        who = path.split("/")[0]
        raise ConfigError(
            f"{key} is {path}, and {who} is no home folder here; write the path out, or ./{path} "
            "for a folder of that name"
        )
    return expanded


def _with_values(words: Sequence[str], config_class: type) -> list[str]:
    """Command line words in which a switch that is given alone, as in `--overwrite`, has its value,
    and settings files below the home folder their place."""
    switches = {f"--{name}" for name in _switches(config_class)}
    found = []
    for word, after in pairwise([*words, "--"]):
        is_alone = word in switches and after.startswith("--")
        found.append(f"{word}=true" if is_alone else word)
    for i, word in enumerate(found):
        if word.startswith("--config="):
            found[i] = "--config=" + _home_path(word.removeprefix("--config="), "config")
        elif i and found[i - 1] == "--config":
            found[i] = _home_path(word, "config")
    return found


def _switches(config_class: type) -> Iterator[str]:
    """Keys of the settings that are true or false."""
    for name, kind in _field_types(config_class).items():
        if kind is bool:
            yield name
        elif _is_section(kind):
            yield from (f"{name}.{key}" for key in _switches(kind))


def _program() -> str:
    """How this process was started: `python -m stages.sft`, or a script's path."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]


def _require(condition: bool, key: str, value: object, remedy: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {value}; {remedy}")


def _field_types(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _named_section(kind: Any) -> type | None:
    """The settings class of a mapping from the user's names to sections, dict[str, Section]."""
    values = typing.get_args(kind)[1:] if typing.get_origin(kind) is dict else ()
    return values[0] if values and _is_section(values[0]) else None


def _check_sections(config_class: type, values: Namespace) -> None:
    """Refuse what jsonargparse lets through: null for any type, a section that is no mapping."""
    for name, kind in _field_types(config_class).items():
        value = values.get(name)
        if value is None and kind is not Any and type(None) not in typing.get_args(kind):
            raise ConfigError(f"{name} is null; give a value of type {_type_name(kind)}")
        if _is_section(kind):
            _check_section(name, kind, value)
        elif section := _named_section(kind):
            for own_name, part in value.items():
                _check_section(f"{name}.{own_name}", section, part)


def _check_section(name: str, section: type, value: object) -> None:
    """Refuse what is no section, or what the section's own checks refuse, by its whole name."""
    if not isinstance(value, Namespace):
        keys = ", ".join(keys_of(section))
        raise ConfigError(f"{name} is {value!r}; give a section with the keys {keys}")
    try:
        _check_sections(section, value)
        section(**vars(value))
    except ValueError as error:
        raise ConfigError(f"{name}.{error}") from error


def _type_name(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")


def config_files(words: Sequence[str]) -> list[Path]:
    """The settings files that a command line names."""
    after = [path for word, path in pairwise(words) if word == "--config"]
    joined = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return [Path(os.path.expanduser(path)) for path in after + joined]


def _check_file(path: Path, config_class: type) -> None:
    """Refuse a settings file with a message that names it, which jsonargparse's do not."""
    if not path.is_file():
        raise ConfigError(f"--config {path} does not exist or is no file; correct the path")
    try:
        text = path.read_text(encoding="utf-8")
        has_alias = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
        settings = None if has_alias else yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {_one_line(str(error))}") from error
    if has_alias:  # ten lines of them can stand for more values than fit in memory
        raise ConfigError(f"{path} holds a YAML alias (*name); write the value out in its place")
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} holds {show(settings)}; write settings as `key: value` lines")
    known = keys_of(config_class)
    for key, _ in _dotted_pairs(settings, known):
        named = _with_own_names(known, key)
        if key not in named:
            raise ConfigError(f"{path}: unknown setting {key}; {_nearest(key, named)}")
    _refuse_section_files(_dotted_pairs(settings, known), config_class)


def _refuse_section_files(pairs: Iterable[tuple[str, Any]], config_class: type) -> None:
    """Refuse a file in the place of a section: the library would read it, in the locale's encoding
    and without the checks of `_check_file`."""
    known = keys_of(config_class)
    for key, value in pairs:
        inner = [one for one in _with_own_names(known, key) if one.startswith(f"{key}.")]
        if inner and isinstance(value, str) and os.path.isfile(value):
            raise ConfigError(
                f"{key} is {value}, which is a file; {key} is a section, given by its keys, such "
                f"as {inner[0]}; a file of settings is given by --config FILE"
            )


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(key, value) of the settings on a command line."""
    for word, after in pairwise([*words, ""]):
        if word.startswith("--"):
            key, is_joined, value = word.removeprefix("--").partition("=")
            yield key, value if is_joined else after


def _dotted_pairs(
    settings: dict[Any, Any], known: Sequence[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(key, value) of the settings in a file, those of sections too."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        yield key, value
        named = _with_own_names(known, key)
        if isinstance(value, dict) and any(other.startswith(f"{key}.") for other in named):
            yield from _dotted_pairs(value, known, f"{key}.")


def _with_own_names(known: Sequence[str], key: str) -> list[str]:
    """Known keys in which the words of `key` stand in the place of NAME."""
    own = key.split(".")

    def fill(other: str) -> str:
        words = enumerate(other.split("."))
        return ".".join(own[i] if word == OWN_NAME and i < len(own) else word for i, word in words)

    return [fill(other) for other in known]


def _explain(message: str, config_class: type) -> str:
    """The library's message in one line; an unknown option is followed by the nearest known one."""
    message = _one_line(message)
    if option := _UNKNOWN_OPTION.search(message):
        key = option[1].removeprefix("--")
        return f"unknown setting {key}; {_nearest(key, [*keys_of(config_class), 'config'])}"
    if word := _STRAY_WORD.search(message):
        return f"{word[1]!r} is not an option; settings are given as --key value"
    if (key := _KEY.search(message)) and f"{key[1]}.{OWN_NAME}" in keys_of(config_class):
        message = _explain_named(key[1], key[2], keys_of(config_class))
    message = _UNION.sub(r"Expected one of \1. Got value: \2", message)
    return _CLASS.sub(
        lambda found: found[1] or "null",
        message.replace("Parser key ", "setting ").replace("typing.", ""),
    )


def _explain_named(key: str, message: str, known: Sequence[str]) -> str:
    """The library's message about a section that the user named; it does not say which one."""
    own = f"{key}.{OWN_NAME}"
    if option := _NOT_ACCEPTED.search(message):
        wrong = f"{own}.{option[1]}"
        return f"unknown setting {wrong}; {_nearest(wrong, known)}"
    if inner := _KEY.search(message):
        return f'setting "{own}.{inner[1]}": {inner[2]}'
    keys = [other.removeprefix(f"{own}.") for other in known if other.startswith(f"{own}.")]
    return f"{key} takes a section for every name, with the keys {', '.join(keys)}"


def _nearest(key: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {nearest[0]}?" if nearest else "--help lists all settings"


def _one_line(text: str) -> str:
    return " ".join(text.split())
