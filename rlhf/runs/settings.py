"""Loads the settings of every program."""

import dataclasses
import difflib
import functools
import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from rlhf.inputs.ranges import Ranged
from rlhf.inputs.records import show
from rlhf.runs.files import plain_values

Config = TypeVar("Config")

_UNKNOWN_OPTION = re.compile(r"unrecognized arguments: (--[^\s=]+)")
_STRAY_WORD = re.compile(r"unrecognized arguments: (\S+)")
_UNION = re.compile(r"Does not validate .*Subtypes: \[(.*?)\] Errors:.*Given value: (.*)")
_ANNOTATED = re.compile(r"Annotated\[(\w+),(\s+)([^\]]+)\]")
_OPTIONAL_RANGE = re.compile(r"Optional\[\s*Annotated\[(\w+),(\s+)([^\]]+)\]\s*\]")
_CLASS = re.compile(r"<class '(?:NoneType'>|(\w+)'>)")
_KEY = re.compile(r'Parser key "([\w.]+)": (.*)')
_NOT_ACCEPTED = re.compile(r"Option '(.*?)' is not accepted")

OWN_NAME = "NAME"
"""Placeholder in `keys_of` for a name that the user gives to a section."""


class ConfigError(ValueError):
    """Says that settings cannot be used: the key, the value and the remedy."""


RUN_DIR = "${run_dir}"
"""Placeholder for the setting run_dir at the beginning of a path."""


@dataclass(frozen=True, kw_only=True)
class FolderSettings(Ranged):
    """Settings of a program that writes a folder."""

    overwrite: bool = False
    """Replace what a run of other settings, or other data, left in the output folder. Files that no
    program of this project wrote always stay."""
    force: bool = False
    """Run even if the output folder holds the finished run of these settings, data and code."""


@dataclass(frozen=True, kw_only=True)
class StageSettings(FolderSettings):
    """Settings that every stage has."""

    run_dir: str | None = None
    """Folder that holds the stages' folders. Other settings may begin with ${run_dir}:
    ${run_dir}/sft is the folder sft in it."""


def load_config(config_class: type[Config], args: Sequence[str] | None = None) -> Config:
    """Load settings: the dataclass's defaults, then --config files in order, then options.

    Args:
        config_class: A frozen, keyword-only dataclass with an attribute docstring for each field.
        args: Command line words. None means those of this process.

    Raises:
        ConfigError: A key is unknown (the message names the nearest known one) or missing, a type
            is wrong, a file cannot be read, or `__post_init__` refused a value.
    """
    parser = _parser_of(config_class)  # type: ignore[arg-type]  # classes have a hash
    parser.usage = f"{_program()} [--config FILE]... [--KEY VALUE]..."
    words = _with_values(sys.argv[1:] if args is None else args, config_class)
    for path in config_files(words):
        _check_file(path, config_class)
    _refuse_section_files(_pairs(words), config_class)
    try:
        values = parser.parse_args(words)
    except ArgumentError as error:
        raise ConfigError(_explain(str(error), config_class)) from error
    values.pop("config")
    values = _with_whole_paths(values)
    _check_sections(config_class, values)
    return config_class(**vars(parser.instantiate(values)))


@functools.cache
def _parser_of(config_class: type) -> "_Parser":
    """Return the parser of a settings class. Making one takes a fifth of a second."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = _Parser(
        description=config_class.__doc__,
        allow_abbrev=False,  # otherwise --learn would mean --learning_rate
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with settings; may be given more than once, later files win.",
    )
    parser.add_class_arguments(config_class, as_group=False)
    return parser


class _Parser(ArgumentParser):
    """Reads settings files as UTF-8 instead of the locale's encoding, and shows ranges of numbers
    in plain words in --help."""

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        text: str = super().format_help(*args, **kwargs)
        text = _OPTIONAL_RANGE.sub(r"\1 | null,\2\3", text)
        return _ANNOTATED.sub(r"\1,\2\3", text)

    def parse_path(self, path: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Namespace:
        text = Path(path).read_text(encoding="utf-8")
        return self.parse_string(text, os.path.basename(path), *args, **kwargs)


def keys_of(config_class: type) -> list[str]:
    """Return all keys of a settings class; those of sections are dotted: `optim.learning_rate`.

    NAME stands for a section that the user names: `reward.parts.NAME.weight`.
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


def _with_whole_paths(values: Namespace) -> Namespace:
    """Replace a leading `~`, and a leading `${run_dir}`, in every text of the settings.

    Only paths begin so; no other setting does."""
    given = vars(values).get("run_dir")
    run_dir = None if given is None else _home_path(given, "run_dir")

    def whole(value: Any, key: str) -> Any:
        if isinstance(value, str):
            return _home_path(_below_run_dir(value, key, run_dir), key)
        if isinstance(value, Namespace):
            return Namespace(**whole(vars(value), key))
        if isinstance(value, dict):
            return {name: whole(one, f"{key}.{name}".lstrip(".")) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(whole(one, key) for one in value)
        return value

    return whole(values, "")


def _below_run_dir(path: str, key: str, run_dir: str | None) -> str:
    if not path.startswith(RUN_DIR):
        return path
    if run_dir is None:
        raise ConfigError(f"{key} is {path}, and run_dir is not set; give --run_dir FOLDER")
    return run_dir + path.removeprefix(RUN_DIR)


def _home_path(path: str, key: str) -> str:
    """Replace a leading `~` or `~name` by the home folder; leave any other text as it is."""
    if not path.startswith("~"):
        return path
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        who = path.split("/")[0]
        raise ConfigError(
            f"{key} is {path}, and there is no home folder {who}; write the path out, or ./{path} "
            "for a folder of that name"
        )
    return expanded


def _with_values(words: Sequence[str], config_class: type) -> list[str]:
    """Complete command line words: give a lone switch, as in `--overwrite`, its value.

    Replace `~` in the paths of settings files too."""
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
    """Yield the keys of the settings that are true or false."""
    for name, kind in _field_types(config_class).items():
        if kind is bool:
            yield name
        elif _is_section(kind):
            yield from (f"{name}.{key}" for key in _switches(kind))


def _program() -> str:
    """Return how this process was started: `python -m stages.sft`, or a script's path."""
    spec = sys.modules["__main__"].__spec__
    return f"python -m {spec.name.removesuffix('.__main__')}" if spec else sys.argv[0]


def _field_types(config_class: type) -> dict[str, Any]:
    hints = typing.get_type_hints(config_class)
    return {field.name: hints[field.name] for field in dataclasses.fields(config_class)}


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


def _named_section(kind: Any) -> type | None:
    """Return the settings class in a dict[str, Section], whose names the user gives, or None."""
    values = typing.get_args(kind)[1:] if typing.get_origin(kind) is dict else ()
    return values[0] if values and _is_section(values[0]) else None


def _check_sections(config_class: type, values: Namespace) -> None:
    """Refuse what jsonargparse accepts: null for any type, and a section that is not a mapping."""
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
    """Refuse a value that is not a section or fails the section's checks; name its full key."""
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
    """Return the settings files that a command line names."""
    after = [path for word, path in pairwise(words) if word == "--config"]
    joined = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
    return [Path(os.path.expanduser(path)) for path in after + joined]


def _check_file(path: Path, config_class: type) -> None:
    """Refuse a bad settings file with a message that names it; jsonargparse's messages do not."""
    if not path.is_file():
        raise ConfigError(f"--config {path} does not exist or is not a file; correct the path")
    try:
        text = path.read_text(encoding="utf-8")
        has_alias = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
        settings = None if has_alias else yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {_one_line(str(error))}") from error
    if has_alias:  # ten lines of aliases can expand to more values than fit in memory
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
    """Refuse a file in the place of a section. jsonargparse would read it in the locale's encoding
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
    """Yield (key, value) of the settings on a command line."""
    for word, after in pairwise([*words, ""]):
        if word.startswith("--"):
            key, is_joined, value = word.removeprefix("--").partition("=")
            yield key, value if is_joined else after


def _dotted_pairs(
    settings: dict[Any, Any], known: Sequence[str], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) of the settings in a file, also those in sections."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        yield key, value
        named = _with_own_names(known, key)
        if isinstance(value, dict) and any(other.startswith(f"{key}.") for other in named):
            yield from _dotted_pairs(value, known, f"{key}.")


def _with_own_names(known: Sequence[str], key: str) -> list[str]:
    """Return the known keys with NAME replaced by the word of `key` at the same place."""
    own = key.split(".")

    def fill(other: str) -> str:
        if OWN_NAME not in other:
            return other
        words = enumerate(other.split("."))
        return ".".join(own[i] if word == OWN_NAME and i < len(own) else word for i, word in words)

    return [fill(other) for other in known]


def _explain(message: str, config_class: type) -> str:
    """Return jsonargparse's message in one line; for an unknown key, name the nearest one."""
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
        _ANNOTATED.sub(r"\1", message).replace("Parser key ", "setting ").replace("typing.", ""),
    )


def _explain_named(key: str, message: str, known: Sequence[str]) -> str:
    """Explain an error in a section that the user named; jsonargparse does not say which one."""
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


def settings_in_use(config: Any) -> dict[str, Any]:
    """Turn a settings dataclass into plain YAML values, sections into mappings."""
    return plain_values(dataclasses.asdict(config))


def default_settings(config: Any) -> dict[str, Any]:
    """Return the defaults of a settings dataclass, as `settings_in_use` returns its settings.

    A setting that has no default is left out.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
            is_section = dataclasses.is_dataclass(default)
            found[field.name] = dataclasses.asdict(default) if is_section else default
        elif dataclasses.is_dataclass(value):
            found[field.name] = default_settings(value)
    return plain_values(found)
