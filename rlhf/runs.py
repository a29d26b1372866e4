"""A run's folder: what went in, what was measured, what came out. The next stage takes its path.

config.yaml     settings in force; --config of the same program takes it again
lineage.json    hashes of the inputs, results of the runs that made them, commit, versions
metrics.jsonl   one object a logged step: {"step": 10, "sft/loss": 2.1}
samples.jsonl   texts that the model wrote, one object a row
base.json       of an adapter: path and hash of the full model that it belongs over (rlhf.lora)
results.json    final figures; written last, so its presence says that the run is complete
"""

import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import yaml

CONFIG = "config.yaml"
LINEAGE = "lineage.json"
METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
RESULTS = "results.json"
BASE_FILE = "base.json"

_PACKAGES = ("torch", "transformers", "trl", "accelerate", "datasets", "tokenizers", "safetensors")
_HASHED = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "reward.json",
    "*.safetensors",
    "*.jsonl",
    "*.jsonl.gz",
)
_RUN_FILES = {METRICS, SAMPLES}
_FILE_SUFFIXES = {".jsonl", ".json", ".gz", ".gguf", ".txt", ".yaml"}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class RunSettings(Protocol):
    """What open_run asks of a stage's settings."""

    @property
    def output_dir(self) -> str: ...


@dataclasses.dataclass
class Run:
    """One run of one stage; made by open_run. Only the first process writes."""

    stage: str
    _dir: Path
    _config: RunSettings
    _lineage: dict[str, Any]
    _resume_step: int | None
    _started: float
    _begun: bool = False

    @property
    def dir(self) -> Path:
        """The run's folder. It is made at first use, so a run that fails on its inputs leaves
        what was there before as it was."""
        self._begin()
        return self._dir

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl; keys are "stage/thing", values numbers."""
        self._append(METRICS, [{"step": step, **metrics}])

    def samples(self, rows: Iterable[Mapping[str, Any]], step: int | None = None) -> None:
        """Append texts to samples.jsonl, each with the step if there is one."""
        mark = {} if step is None else {"step": step}
        self._append(SAMPLES, [{**mark, **row} for row in rows])

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write results.json and "seconds" since open_run in it: the run is complete.

        Where the results have the "seconds" of other stages by name, this stage's join them.
        """
        self._begin()
        seconds = round(time.monotonic() - self._started, 1)
        if not _is_first_process():
            return
        others = results.get("seconds")
        total = seconds if others is None else {**others, self.stage: seconds}
        _write_json(self._dir / RESULTS, {**results, "seconds": total})
        print(f"{self.stage}: wrote {self._dir} in {seconds} s", flush=True)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        self._begin()
        if _is_first_process():
            with (self._dir / name).open("a", encoding="utf-8") as file:
                file.writelines(_to_json(row) + "\n" for row in rows)

    def _begin(self) -> None:
        if self._begun or not _is_first_process():
            return
        self._begun = True
        self._dir.mkdir(parents=True, exist_ok=True)
        (self._dir / RESULTS).unlink(missing_ok=True)
        for name in (METRICS, SAMPLES):
            _keep_until(self._dir / name, self._resume_step)
        text = yaml.safe_dump(settings_in_force(self._config), sort_keys=False, allow_unicode=True)
        _write(self._dir / CONFIG, text)
        _write_json(self._dir / LINEAGE, self._lineage)


def open_run(
    config: RunSettings,
    *,
    stage: str,
    inputs: Mapping[str, str | Path],
    resume_step: int | None = None,
) -> Run:
    """Print the settings in force and what is read and written; note where the inputs come from.

    Args:
        config: The stage's settings, a dataclass with `output_dir`.
        stage: Name of the stage.
        inputs: What is read, by name: files, folders, or hub ids.
        resume_step: Metrics and samples of later steps are dropped; None drops all of them.

    Raises:
        FileNotFoundError: An input is neither there nor a possible hub id.
    """
    started = time.monotonic()
    sources = {name: str(path) for name, path in inputs.items()}
    for name, path in sources.items():
        _check_input(stage, name, path)
    output = Path(config.output_dir)
    lineage: dict[str, Any] = {}
    if _is_first_process():
        _announce(stage, config, sources, output)
        lineage = {
            "stage": stage,
            "inputs": {name: _describe_input(path) for name, path in sources.items()},
            "commit": _commit(),
            "versions": _versions(),
        }
    return Run(stage, output, config, lineage, resume_step, started)


def settings_in_force(config: Any) -> dict[str, Any]:
    """A settings dataclass as plain YAML values, sections as mappings."""
    return _plain(dataclasses.asdict(config))


def _is_first_process() -> bool:
    # Read from the launcher's variable: asking accelerate here would start the process group
    # before the stage's Accelerator has chosen its backend.
    return int(os.environ.get("RANK", "0")) == 0


def _announce(stage: str, config: RunSettings, sources: dict[str, str], output: Path) -> None:
    print(f"{stage}: settings in force")
    for key, value in _flat(settings_in_force(config)):
        print(f"  {key}: {value}")
    for name, path in sources.items():
        print(f"{stage}: reads {name} from {path}")
    print(f"{stage}: writes {output}", flush=True)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _check_input(stage: str, name: str, path: str) -> None:
    if Path(path).exists() or path.startswith("hub:"):
        return
    if _HUB_ID.fullmatch(path) is None or Path(path).suffix in _FILE_SUFFIXES:
        raise FileNotFoundError(
            f"{stage} reads {name} from {path}, which does not exist; run the stage that makes "
            f"it, or correct the path"
        )


def _describe_input(path: str) -> dict[str, Any]:
    """Where an input comes from: SHA-256 of its files, and results of the run that made it."""
    place = Path(path)
    if not place.exists():
        return {"hub": path}
    folder = place if place.is_dir() else place.parent
    files = sorted(_hashed_files(place)) if place.is_dir() else [place]
    described: dict[str, Any] = {
        "path": path,
        "sha256": {file.name: _sha256(file) for file in files},
    }
    if (folder / BASE_FILE).is_file():
        described["base"] = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
    if (folder / RESULTS).is_file() and (folder / LINEAGE).is_file():
        described["results"] = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        described["lineage_sha256"] = _sha256(folder / LINEAGE)
    return described


def _hashed_files(folder: Path) -> set[Path]:
    found = {file for pattern in _HASHED for file in folder.glob(pattern) if file.is_file()}
    return {file for file in found if file.name not in _RUN_FILES}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _commit() -> str | None:
    """Commit of this source tree, marked when files differ from it; None outside a git tree."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        commit = subprocess.check_output([*git, "rev-parse", "HEAD"], stderr=subprocess.DEVNULL)
        changes = subprocess.check_output([*git, "status", "--porcelain", "-uno"])
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.decode().strip() + (" with local changes" if changes.strip() else "")


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        versions[package] = metadata.version(package)
    return versions


def _keep_until(path: Path, step: int | None) -> None:
    if step is None:
        path.unlink(missing_ok=True)
    elif path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        _write(path, "".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    """A row without a step stays; a line cut off by an interrupt goes."""
    try:
        return json.loads(line).get("step", -math.inf)
    except json.JSONDecodeError:
        return math.inf


def _plain(value: Any) -> Any:
    """Tensors and NumPy numbers as Python numbers, tuples as lists, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value.item() if hasattr(value, "item") else value


def _finite(value: Any) -> Any:
    """What JSON cannot hold (nan, inf) as text."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _to_json(value: Mapping[str, Any], indent: int | None = None) -> str:
    return json.dumps(_finite(_plain(value)), ensure_ascii=False, indent=indent, allow_nan=False)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, _to_json(value, indent=2) + "\n")


def _write(path: Path, text: str) -> None:
    """Written beside and renamed: a reader sees the old file or the whole new one."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)
