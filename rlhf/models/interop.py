"""Adds to a saved folder the names that transformers 4 reads, next to those of transformers 5.

Version 5 moved the settings of rotary positions into `rope_parameters`, and gives tokenizers a
class that version 4 does not know. Version 4, and any program that reads config.json the same way,
would use its own default base of the angles without a warning. It also could not load the
tokenizer. Version 5 reads both names. If the old ones would change what it reads, only the new ones
stay.
"""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING

_NOT_SCALING = ("rope_theta", "partial_rotary_factor")
"""Settings that version 4 has next to `rope_scaling`, not inside it."""

_LONGROPE_FACTORS = ("short_factor", "long_factor")
"""The only settings besides the type that version 4 allows in Phi-3's `rope_scaling`."""

_OWN_NAMES = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "modernbert-decoder": {"rope_theta": "global_rope_theta", "local": "local_rope_theta"},
}
"""Maps a model_type to its names in version 4 where these differ from the usual ones. "local" is
the base of the angles in layers with a window."""


def add_version_4_names(folder: str | Path) -> None:
    """Add these names to the config and tokenizer files of a folder, if the files exist."""
    config, tokenizer = (Path(folder) / f"{name}.json" for name in ("config", "tokenizer_config"))
    if config.is_file():
        _name_rope_settings(config)
    if tokenizer.is_file():
        values = _read(tokenizer)
        _name_tokenizer(values, _prefix_space(Path(folder) / "tokenizer.json"))
        _write(tokenizer, values)


def _name_rope_settings(path: Path) -> None:
    """Add the names to a config.json, unless version 5 would then read something else from it."""
    values = _read(path)
    named = copy.deepcopy(values)
    _add_rope_settings(named)
    if values.get("model_type") not in CONFIG_MAPPING:  # only the model's own code can read it
        _write(path, named)
        return
    config_class = CONFIG_MAPPING[values["model_type"]]
    before = config_class.from_pretrained(path.parent).to_dict()
    _write(path, named)
    try:
        is_read_alike = _contains(config_class.from_pretrained(path.parent).to_dict(), before)
    except Exception:  # a config class may fail in any way on names that it does not know
        is_read_alike = False
    if not is_read_alike:
        _write(path, values)


def _contains(whole: Any, part: Any) -> bool:
    """Return whether the whole has everything that is in the part, with equal values."""
    if isinstance(whole, dict) and isinstance(part, dict):
        return all(key in whole and _contains(whole[key], part[key]) for key in part)
    return bool(whole == part)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _add_rope_settings(config: dict[str, Any]) -> None:
    """Add version 4's names, also in inner configs, such as the text model's of a vision model."""
    for value in config.values():
        if isinstance(value, dict) and "model_type" in value:
            _add_rope_settings(value)
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    names = {"local": "rope_local_base_freq"} | _OWN_NAMES.get(config.get("model_type", ""), {})
    settings = dict(rope)
    if isinstance(full := rope.get("full_attention"), dict):  # settings by kind of layer
        settings = dict(full)
        local = rope.get("sliding_attention")
        if isinstance(local, dict) and "rope_theta" in local:
            config[names["local"]] = local["rope_theta"]
    for name in _NOT_SCALING:
        if name in settings:
            config[names.get(name, name)] = settings[name]
    config["rope_scaling"] = _scaling(settings)


def _scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "longrope":
        return {"type": kind, **{name: rope[name] for name in _LONGROPE_FACTORS if name in rope}}
    return {name: value for name, value in rope.items() if name not in _NOT_SCALING}


def _prefix_space(path: Path) -> bool | None:
    """Return whether a tokenizer.json puts a space before a text; None if it does not say."""
    splitter = _read(path).get("pre_tokenizer") if path.is_file() else None
    return None if splitter is None else splitter.get("add_prefix_space")


def _name_tokenizer(config: dict[str, Any], prefix_space: bool | None) -> None:
    """Name the tokenizer's class, special tokens and leading space as version 4 does.

    The class must read tokenizer.json as it is. Without the setting for the space before a text,
    version 4 would remove that space."""
    if prefix_space is not None:
        config["add_prefix_space"] = prefix_space
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.get("extra_special_tokens")
    if isinstance(extra, list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    named = config.get("model_specific_special_tokens")
    if isinstance(named, dict):
        config.setdefault("extra_special_tokens", named)
