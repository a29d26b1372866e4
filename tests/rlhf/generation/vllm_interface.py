"""Reads what vLLM's interface takes from its source, for the stand-in that tests our engine.

    python -m tests.rlhf.generation.vllm_interface vllm-0.30.0-cp38-abi3-manylinux_2_28_x86_64.whl

writes vllm_interface.json beside this file. The source is parsed, not imported, so no GPU and none
of vLLM's requirements are needed. It may be a wheel, or the folder of an unpacked release.
"""

import ast
import inspect
import json
import re
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_suffix(".json")
METHODS = ("__init__", "generate", "apply_model", "reset_prefix_cache", "sleep", "wake_up")
"""Methods of vllm.LLM that our engine calls."""
FIELDS = {
    "EngineArgs": "vllm/engine/arg_utils.py",  # takes the other keywords of LLM.__init__
    "SamplingParams": "vllm/sampling_params.py",
    "RequestOutput": "vllm/outputs.py",
    "CompletionOutput": "vllm/outputs.py",
    "Logprob": "vllm/logprobs.py",
}
"""Classes of which our engine uses fields, with their files."""
ENVIRONMENT = "vllm/envs.py"


@dataclass(frozen=True)
class Interface:
    """Holds what a version of vLLM takes and gives."""

    version: str
    methods: dict[str, inspect.Signature]
    """Signatures of METHODS, without self."""
    fields: dict[str, list[str]]
    """Names of the fields of each class of FIELDS."""
    variables: list[str]
    """Names of its environment variables."""

    @classmethod
    def load(cls) -> "Interface":
        stored = json.loads(FILE.read_text(encoding="utf-8"))
        methods = {name: _signature(of) for name, of in stored.pop("methods").items()}
        return cls(methods=methods, **stored)

    def bind(self, method: str, *args: Any, **kwargs: Any) -> None:
        """Raise TypeError if this method does not take these arguments."""
        bound = self.methods[method].bind(*args, **kwargs)
        unknown = set(bound.arguments.get("kwargs", {})) - set(self.fields["EngineArgs"])
        if unknown:
            raise TypeError(f"EngineArgs has no {', '.join(sorted(unknown))}")

    def check_fields(self, of: str, names: Any) -> None:
        """Raise TypeError if this class does not have all these fields."""
        unknown = set(names) - set(self.fields[of])
        if unknown:
            raise TypeError(f"{of} has no {', '.join(sorted(unknown))}")


def main(source: str) -> None:
    version = re.search(r"vllm-(\d+(?:\.\d+)*)", Path(source).name)
    assert version is not None, f"{source} is not named vllm-VERSION"
    llm = _class("LLM", _read(source, "vllm/entrypoints/llm.py"))
    functions = {f.name: f for f in llm.body if isinstance(f, ast.FunctionDef)}
    stored = {
        "version": version[1],
        "methods": {name: _parameters(functions[name].args) for name in METHODS},
        "fields": {name: _field_names(name, _read(source, file)) for name, file in FIELDS.items()},
        "variables": sorted(
            node.target.id
            for node in ast.walk(ast.parse(_read(source, ENVIRONMENT)))
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
            if node.target.id.startswith("VLLM_")
        ),
    }
    FILE.write_text(json.dumps(stored) + "\n", encoding="utf-8")


def _read(source: str, name: str) -> str:
    if Path(source).is_dir():
        return Path(source, name).read_text(encoding="utf-8")
    with zipfile.ZipFile(source) as wheel:
        return wheel.read(name).decode()


def _class(name: str, text: str) -> ast.ClassDef:
    [found] = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    return found


def _field_names(name: str, text: str) -> list[str]:
    """Return fields that are declared in the class, or set by its __init__."""
    body = _class(name, text).body
    declared = [
        node.target.id
        for node in body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    ]
    starts = [f for f in body if isinstance(f, ast.FunctionDef) and f.name == "__init__"]
    taken = [arg.arg for start in starts for arg in [*start.args.args[1:], *start.args.kwonlyargs]]
    return sorted({*declared, *taken})


def _parameters(arguments: ast.arguments) -> list[list[str]]:
    """Return (name, kind, "required" or "optional") of each parameter but self."""
    plain = [*arguments.posonlyargs, *arguments.args][1:]
    num_required = len(plain) - len(arguments.defaults)
    rows = [
        [one.arg, "POSITIONAL_OR_KEYWORD", "required" if i < num_required else "optional"]
        for i, one in enumerate(plain)
    ]
    rows += [
        [one.arg, "KEYWORD_ONLY", "required" if default is None else "optional"]
        for one, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    return rows + ([["kwargs", "VAR_KEYWORD", "required"]] if arguments.kwarg else [])


def _signature(rows: list[list[str]]) -> inspect.Signature:
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                getattr(inspect.Parameter, kind),
                default=None if needed == "optional" else inspect.Parameter.empty,
            )
            for name, kind, needed in rows
        ]
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
