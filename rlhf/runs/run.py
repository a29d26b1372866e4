"""A run's folder: what went in, what was measured, what came out. The next stage takes its path.

config.yaml     settings in force; --config of the same program takes it again
lineage.json    hashes of the inputs, results of the runs that made them, commit, versions
metrics.jsonl   one object a logged step: {"step": 10, "sft/loss": 2.1}
samples.jsonl   texts that the model wrote, one object a row
trackers/       the same for TensorBoard and W&B, where the settings ask for them
base.json       of an adapter: path and hash of the full model that it belongs over
results.json    final figures; written last, so its presence says that the run is complete
checkpoints/    while the run is not: what it goes on from when it is started again

Only a folder that bears the mark of the program is written over (rlhf.runs.folder).
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import yaml

from rlhf.inputs.whole_files import sync_to_disk, write_text
from rlhf.runs.files import plain_values, to_json, write_json
from rlhf.runs.folder import (
    CONFIG,
    LINEAGE,
    METRICS,
    RESULTS,
    SAMPLES,
    OutputFolder,
    contents_of,
    flat_settings,
    refuse_inputs_inside,
    take_folder,
)
from rlhf.runs.lineage import BASE_FILE, check_input, commit, describe_input, versions
from rlhf.runs.settings import settings_in_force
from rlhf.runs.trackers import TRACKERS, Tracker, Trackers, check_trackers

CHECKPOINTS = "checkpoints"

_CHECKPOINT_FILES = (f"{CHECKPOINTS}/step-*", f"{CHECKPOINTS}/checkpoint-*")
_TRACKER_FILES = (f"{TRACKERS}/tensorboard", f"{TRACKERS}/wandb")
_WRITTEN = (CONFIG, LINEAGE, METRICS, SAMPLES, RESULTS, *_CHECKPOINT_FILES, *_TRACKER_FILES)
"""What every run may write."""


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
    _started: float
    _folder: OutputFolder | None = None
    """None in all processes but the first."""
    _resume_step: int | None = None
    _begun: bool = False
    _trackers: Trackers | None = None

    @property
    def dir(self) -> Path:
        """The run's folder. It is made at first use, so a run that fails on its inputs leaves
        what was there before as it was."""
        self._begin()
        return self._dir

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints of this run lie, whether or not there are any."""
        return self._dir / CHECKPOINTS

    @property
    def is_finished(self) -> bool:
        """The folder holds the results of an earlier run, which is about to be done anew."""
        return not self._begun and (self._dir / RESULTS).is_file()

    @property
    def replaces_another(self) -> bool:
        """The folder holds a run of other settings, which this one is to replace; only the first
        process knows."""
        return self._folder is not None and self._folder.is_other

    @property
    def may_overwrite(self) -> bool:
        """What a run of other settings left in the folder may be replaced."""
        return _may_overwrite(self._config)

    @property
    def seconds(self) -> float:
        """Wall time of this run so far, that before a resume included."""
        return time.monotonic() - self._started

    def identity(self) -> dict[str, Any]:
        """What the run does, as plain values: a checkpoint is of this run if it agrees. Only the
        first process knows its inputs."""
        return {"stage": self.stage, "settings": settings_in_force(self._config), **self._lineage}

    def resume(self, step: int, seconds: float) -> None:
        """Go on behind a step: rows of later ones are dropped, the seconds count as taken."""
        assert not self._begun
        self._resume_step = step
        self._started -= seconds

    def sync(self) -> None:
        """All rows so far are on the disk, not only with the system."""
        self._begin()
        if _is_first_process():
            for path in (self._dir / METRICS, self._dir / SAMPLES, self._dir):
                if path.exists():
                    sync_to_disk(path)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl; keys are "stage/thing", values numbers."""
        self._append(METRICS, [{"step": step, **metrics}])
        if self._trackers is not None:
            self._trackers.log(step, plain_values(metrics))

    def samples(self, rows: Iterable[Mapping[str, Any]], step: int | None = None) -> None:
        """Append texts to samples.jsonl, each with the step if there is one."""
        mark = {} if step is None else {"step": step}
        marked = [{**mark, **row} for row in rows]
        self._append(SAMPLES, marked)
        if self._trackers is not None:
            self._trackers.samples(step, marked)

    def finish(self, results: Mapping[str, Any]) -> None:
        """Write results.json and "seconds" since open_run in it: the run is complete, and its
        checkpoints go.

        Where the results have the "seconds" of other stages by name, this stage's join them, and
        "total" is their sum: stages that ran side by side took less by the clock.
        """
        self._begin()
        seconds = round(self.seconds, 1)
        if self._folder is None:
            return
        others = results.get("seconds")
        of_all = seconds if others is None else _with_total({**others, self.stage: seconds})
        write_json(self._dir / RESULTS, {**results, "seconds": of_all})
        if self._trackers is not None:
            self._trackers.finish()
        self._folder.remove(_CHECKPOINT_FILES)
        self._folder.finish()
        print(f"{self.stage}: wrote {self._dir} in {seconds} s", flush=True)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        self._begin()
        if _is_first_process():
            with (self._dir / name).open("a", encoding="utf-8") as file:
                file.writelines(to_json(row) + "\n" for row in rows)

    def _begin(self) -> None:
        if self._begun or self._folder is None:
            return
        self._begun = True
        is_anew = self._resume_step is None
        self._folder.begin([RESULTS, *(_CHECKPOINT_FILES + _TRACKER_FILES if is_anew else ())])
        for name in (METRICS, SAMPLES):
            _keep_until(self._dir / name, self._resume_step)
        settings = _lasting_settings(self._config)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_text(self._dir / CONFIG, text)
        write_json(self._dir / LINEAGE, self._lineage)
        self._trackers = self._start_trackers()

    def _start_trackers(self) -> Trackers | None:
        names = _trackers_of(self._config)
        folder = self._dir / TRACKERS
        first_step = None if self._resume_step is None else self._resume_step + 1
        settings = settings_in_force(self._config)
        return Trackers(names, folder, self.stage, settings, first_step) if names else None


def open_run(
    config: RunSettings,
    *,
    stage: str,
    inputs: Mapping[str, str | Path],
    files: Sequence[str] = (),
    is_shared: bool = False,
) -> Run:
    """Print the settings in force and what is read and written; note where the inputs come from.

    The folder is taken for this process until the run is finished, or `folders_given_back` ends.

    Args:
        config: The stage's settings, a dataclass with `output_dir`; `trackers` and `overwrite` if
            it has any.
        stage: Name of the stage.
        inputs: What is read, by name: files, folders, or hub ids.
        files: Names and patterns of what the stage writes beside what every run does.
        is_shared: The folder may hold other things, such as the folders of other runs.

    Raises:
        FileNotFoundError: An input is neither there nor a possible hub id.
        ValueError: A tracker's package is not installed, an input lies in the folder to write, or
            the folder is not this run's to write over (rlhf.runs.folder).
    """
    started = time.monotonic()
    sources = {name: str(path) for name, path in inputs.items()}
    for name, path in sources.items():
        check_input(stage, name, path)
    check_trackers(_trackers_of(config))
    output = Path(config.output_dir)
    written = (*_WRITTEN, *files)
    refuse_inputs_inside(output, _with_bases(sources), files=written, is_shared=is_shared)
    run = Run(stage, output, config, {}, started)
    if _is_first_process():
        _announce(stage, config, sources, output)
        overwrite = _may_overwrite(config)
        folder = take_folder(
            output, program=stage, files=written, overwrite=overwrite, is_shared=is_shared
        )
        described = {name: describe_input(path) for name, path in sources.items()}
        folder.compare(
            _lasting_settings(config),
            contents_of(described),
            overwrite=overwrite,
            has_checkpoint=_has_checkpoint(output),
        )
        run._folder = folder
        run._lineage = {
            "stage": stage,
            "inputs": described,
            "commit": commit(),
            "versions": versions(),
        }
    return run


def _may_overwrite(config: RunSettings) -> bool:
    return getattr(config, "overwrite", False)


def _lasting_settings(config: RunSettings) -> dict[str, Any]:
    """Without `overwrite`: whoever takes config.yaml for another run has not asked for it."""
    settings = settings_in_force(config)
    settings.pop("overwrite", None)
    return settings


def _with_bases(sources: Mapping[str, str]) -> dict[str, str]:
    """What is read, and the bases of the adapters among it."""
    bases = {}
    for name, path in sources.items():
        with suppress(OSError, ValueError, KeyError, TypeError):  # whoever loads it tells
            base = json.loads((Path(path) / BASE_FILE).read_bytes())["path"]
            bases[f"the base of {name}"] = str(base)
    return {**sources, **bases}


def _has_checkpoint(folder: Path) -> bool:
    """An unfinished run can go on from one."""
    steps = (folder / CHECKPOINTS).glob("step-*")
    return not (folder / RESULTS).is_file() and any(path.suffix != ".part" for path in steps)


def _with_total(seconds: Mapping[str, float]) -> dict[str, float]:
    return {**seconds, "total": round(sum(seconds.values()), 1)}


def _trackers_of(config: RunSettings) -> list[Tracker]:
    return getattr(config, "trackers", [])


def _is_first_process() -> bool:
    # Read from the launcher's variable: asking accelerate here would start the process group
    # before the stage's Accelerator has chosen its backend.
    return int(os.environ.get("RANK", "0")) == 0


def _announce(stage: str, config: RunSettings, sources: dict[str, str], output: Path) -> None:
    print(f"{stage}: settings in force")
    for key, value in flat_settings(settings_in_force(config)):
        print(f"  {key}: {value}")
    for name, path in sources.items():
        print(f"{stage}: reads {name} from {path}")
    print(f"{stage}: writes {output}", flush=True)


def _keep_until(path: Path, step: int | None) -> None:
    if step is None:
        path.unlink(missing_ok=True)
    elif path.is_file():
        with path.open(encoding="utf-8", newline="\n") as file:  # str.splitlines ends at U+2028 too
            kept = [line for line in file if _step_of(line) <= step]
        write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    """A row without a step is of the end of a run: it goes, as does a line that was cut off."""
    try:
        return json.loads(line).get("step", math.inf)
    except json.JSONDecodeError:
        return math.inf
