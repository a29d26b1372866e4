"""Writes a run's folder: what it read, measured and made. The next stage takes the folder's path.

config.yaml     the settings in use; --config of the same program reads them again
lineage.json    hashes of the inputs, results of the runs that made them, commit, versions
metrics.jsonl   one object per logged step: {"step": 10, "sft/loss": 2.1}
samples.jsonl   texts that the model wrote, one object per row
alarms.jsonl    warnings of PPO: {"step": 7, "code": "PPO_KL", "message": "..."}
report.html     a page about all this, for people to look at (rlhf.runs.page)
trackers/       the same for TensorBoard, W&B and trackio, if the settings ask for them
base.json       only for an adapter: path and hash of its base, a full model
results.json    final results; written last, so its presence says that the run is complete
checkpoints/    what the run resumes from, until it is complete

Only a folder with the program's mark is overwritten (rlhf.runs.folder).
"""

import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, get_args

import yaml

from rlhf.inputs.whole_files import sync_to_disk, write_text
from rlhf.runs.code import code_of
from rlhf.runs.files import FileHashes, plain_values, to_json, write_json
from rlhf.runs.folder import (
    ALARMS,
    CONFIG,
    LINEAGE,
    METRICS,
    PAGE,
    RESULTS,
    SAMPLES,
    OutputFolder,
    UpToDate,
    acquire_folder,
    contents_of,
    flat_settings,
    refuse_inputs_inside,
    up_to_date,
)
from rlhf.runs.lineage import BASE_FILE, commit, describe_input, versions
from rlhf.runs.page import Page
from rlhf.runs.settings import default_settings, settings_in_use
from rlhf.runs.shared_files import check_inputs, check_output
from rlhf.runs.trackers import TRACKERS, Tracker, Trackers, check_trackers
from rlhf.training.processes import broadcast_from_first

CHECKPOINTS = "checkpoints"

_CHECKPOINT_FILES = (f"{CHECKPOINTS}/step-*", f"{CHECKPOINTS}/checkpoint-*")
_TRACKER_FILES = tuple(f"{TRACKERS}/{name}" for name in get_args(Tracker))
_ROWS = (METRICS, SAMPLES, ALARMS)
"""Files that grow by rows while the run goes on."""
_WRITTEN = (CONFIG, LINEAGE, *_ROWS, PAGE, RESULTS, *_CHECKPOINT_FILES, *_TRACKER_FILES)
"""Names and patterns of what every run may write."""


class RunSettings(Protocol):
    """The settings of a stage that open_run needs."""

    @property
    def output_dir(self) -> str: ...


@dataclasses.dataclass
class Run:
    """One run of one stage, made by open_run. Only the first process writes."""

    stage: str
    _dir: Path
    _config: RunSettings
    _lineage: dict[str, Any]
    _started: float
    _folder: OutputFolder | None = None
    """None in all processes except the first."""
    _resume_step: int | None = None
    _begun: bool = False
    _trackers: Trackers | None = None

    def __post_init__(self) -> None:
        self._page = Page(self._dir)

    @property
    def dir(self) -> Path:
        """The run's folder, made at first use. A run that fails on its inputs therefore leaves
        everything as it was."""
        self._begin()
        return self._dir

    @property
    def checkpoints(self) -> Path:
        """The folder of this run's checkpoints, whether or not there are any."""
        return self._dir / CHECKPOINTS

    @property
    def is_finished(self) -> bool:
        """Whether the folder holds the results of an earlier run, which this run will replace."""
        return not self._begun and (self._dir / RESULTS).is_file()

    @property
    def replaces_another(self) -> bool:
        """Whether the folder holds a run of other settings, which this one will replace. Only the
        first process knows."""
        return self._folder is not None and self._folder.is_other

    @property
    def may_overwrite(self) -> bool:
        """Whether the results of other settings in the folder may be replaced."""
        return _may_overwrite(self._config)

    @property
    def seconds(self) -> float:
        """Wall time of this run so far, including the time before a resume."""
        return time.monotonic() - self._started

    def identity(self) -> dict[str, Any]:
        """Return the run's stage, settings and lineage as plain values, for its checkpoints.

        Only the first process knows the lineage."""
        return {"stage": self.stage, "settings": settings_in_use(self._config), **self._lineage}

    def resume(self, step: int, seconds: float) -> None:
        """Resume after a step: drop the rows of later steps, and add the seconds to the run's."""
        assert not self._begun
        self._resume_step = step
        self._started -= seconds

    def sync(self) -> None:
        """Force all rows written so far onto the disk, out of the system's buffers."""
        self._begin()
        if _is_first_process():
            for path in (*(self._dir / name for name in _ROWS), self._dir):
                if path.exists():
                    sync_to_disk(path)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append one object to metrics.jsonl. Keys are "stage/thing", values are numbers."""
        self._append(METRICS, [{"step": step, **metrics}])
        if self._trackers is not None:
            self._trackers.log(step, plain_values(metrics))

    def samples(self, rows: Iterable[Mapping[str, Any]], step: int | None = None) -> None:
        """Append texts to samples.jsonl, each with the step if one is given."""
        mark = {} if step is None else {"step": step}
        marked = [{**mark, **row} for row in rows]
        self._append(SAMPLES, marked)
        if self._trackers is not None:
            self._trackers.samples(step, marked)

    def alarms(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append alarms to alarms.jsonl, each with its `step`, `code` and `message`."""
        self._append(ALARMS, [dict(row) for row in rows])

    def refresh_page(self, *, is_last: bool = False) -> None:
        """Write the run's page anew, unless pages would take too much of the run's time.

        Args:
            is_last: Whether the run ends now, without results.
        """
        if self._folder is not None:
            self._page.refresh(is_last=is_last)

    def write_page(self) -> None:
        """Write the run's page."""
        if self._folder is not None:
            self._page.write()

    def finish(self, results: Mapping[str, Any]) -> None:
        """Complete the run: write results.json with the "seconds" taken, and remove checkpoints.

        Results may hold the "seconds" of other stages by name. Then this stage's seconds are added
        to them, and "total" is the sum. Stages that ran at the same time took less wall time.
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
        if self._page.is_there:  # it says that the run goes on
            self._page.write()
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
        self._folder.begin(
            [RESULTS, PAGE, *(_CHECKPOINT_FILES + _TRACKER_FILES if is_anew else ())]
        )
        for name in _ROWS:
            _drop_rows_after(self._dir / name, self._resume_step)
        settings = _lasting_settings(self._config)
        text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
        write_text(self._dir / CONFIG, text)
        write_json(self._dir / LINEAGE, self._lineage)
        self._trackers = self._start_trackers()

    def _start_trackers(self) -> Trackers | None:
        names = _trackers_of(self._config)
        folder = self._dir / TRACKERS
        first_step = None if self._resume_step is None else self._resume_step + 1
        settings = settings_in_use(self._config)
        return Trackers(names, folder, self.stage, settings, first_step) if names else None


def open_run(
    config: RunSettings,
    *,
    stage: str,
    inputs: Mapping[str, str | Path],
    files: Sequence[str] = (),
    is_shared: bool = False,
    always_runs: bool = False,
) -> Run:
    """Print the settings, inputs and output of a run, and record where the inputs come from.

    This process holds the folder until the run is finished or `folders_released` ends. Several
    processes must have joined (`start_accelerator`) before they call this.

    Args:
        config: The stage's settings, a dataclass with `output_dir`. Its `trackers`, `overwrite` and
            `force` are used if it has them.
        stage: Name of the stage.
        inputs: Files, folders or hub ids that are read, by name.
        files: Names and patterns of files that the stage writes besides those of every run.
        is_shared: Whether the folder may hold other things, such as the folders of other runs.
        always_runs: Whether to run even if the folder is up to date, for a stage whose results
            depend on more than its inputs.

    Raises:
        UpToDate: The folder holds the finished run of these settings, inputs and code.
        FileNotFoundError: An input neither exists nor can be a hub id, on one of the machines.
        ValueError: The package of a tracker is not installed, an input lies in the folder to write,
            the folder does not belong to this run (rlhf.runs.folder), or a machine does not see it.
    """
    started = time.monotonic()
    sources = {name: str(path) for name, path in inputs.items()}
    check_inputs(stage, sources)
    check_trackers(_trackers_of(config))
    output = Path(config.output_dir)
    written = (*_WRITTEN, *files)
    refuse_inputs_inside(output, _with_bases(sources), files=written, is_shared=is_shared)
    run = Run(stage, output, config, {}, started)
    if _is_first_process():
        folder = acquire_folder(
            output,
            program=stage,
            files=written,
            overwrite=_may_overwrite(config),
            is_shared=is_shared,
        )
        run._folder = folder
        described = _compare(folder, config, sources, folder.known_hashes)
    check_output(output, run._folder)
    is_current = run._folder is not None and run._folder.is_current
    if broadcast_from_first(is_current and not (_is_forced(config) or always_runs)):
        raise UpToDate(up_to_date(stage, output) if _is_first_process() else "")
    if run._folder is not None:
        if run._folder.known_hashes:  # a new run must not trust sizes and times of files
            described = _compare(run._folder, config, sources, {})
        _announce(stage, config, sources, output)
        if run._folder.outdated:
            print(f"{stage}: replaces the run in {output}: {run._folder.outdated}", flush=True)
        run._lineage = {
            "stage": stage,
            "inputs": described,
            "commit": commit(),
            "code": run._folder.code,
            "versions": versions(),
        }
    return run


def _compare(
    folder: OutputFolder,
    config: RunSettings,
    sources: Mapping[str, str],
    known: Mapping[str, Sequence[Any]],
) -> dict[str, Any]:
    """Compare the run with the one in the folder; return the descriptions of its inputs."""
    hashes = FileHashes(known)
    described = {name: describe_input(path, hashes) for name, path in sources.items()}
    settings = _lasting_settings(config)
    folder.compare(
        settings,
        contents_of(described),
        code=code_of(config, settings),
        hashed=hashes.recorded,
        overwrite=_may_overwrite(config),
        has_checkpoint=_has_checkpoint(folder.path),
    )
    return described


def _may_overwrite(config: RunSettings) -> bool:
    return getattr(config, "overwrite", False)


def _is_forced(config: RunSettings) -> bool:
    return getattr(config, "force", False)


def _lasting_settings(config: RunSettings) -> dict[str, Any]:
    """Return the settings without `overwrite` and `force`, which must not pass to another run
    through config.yaml."""
    settings = settings_in_use(config)
    return {name: one for name, one in settings.items() if name not in ("overwrite", "force")}


def _with_bases(sources: Mapping[str, str]) -> dict[str, str]:
    """Return the inputs, together with the bases of the adapters among them."""
    bases = {}
    for name, path in sources.items():
        with suppress(OSError, ValueError, KeyError, TypeError):  # the loader reports what is wrong
            base = json.loads((Path(path) / BASE_FILE).read_bytes())["path"]
            bases[f"the base of {name}"] = str(base)
    return {**sources, **bases}


def _has_checkpoint(folder: Path) -> bool:
    """Return whether the folder holds an unfinished run that can resume from a checkpoint."""
    steps = (folder / CHECKPOINTS).glob("step-*")
    return not (folder / RESULTS).is_file() and any(path.suffix != ".part" for path in steps)


def _with_total(seconds: Mapping[str, float]) -> dict[str, float]:
    return {**seconds, "total": round(sum(seconds.values()), 1)}


def _trackers_of(config: RunSettings) -> list[Tracker]:
    return getattr(config, "trackers", [])


def _is_first_process() -> bool:
    # Read the launcher's variable. Asking accelerate here would start the process group before the
    # stage's Accelerator has chosen its backend.
    return int(os.environ.get("RANK", "0")) == 0


def _announce(stage: str, config: RunSettings, sources: dict[str, str], output: Path) -> None:
    """Print what the user chose: settings that are not the defaults, inputs, and the folder."""
    defaults = dict(flat_settings(default_settings(config)))
    paths = [*sources.values(), str(output)]
    print(f"{stage}: settings that are not the defaults (all are in {output / CONFIG})")
    for key, value in flat_settings(_lasting_settings(config)):
        is_default = key in defaults and value == defaults[key]
        if not is_default and value not in paths:
            print(f"  {key}: {value}")
    for name, path in sources.items():
        # The figures of a folder are read with it.
        if Path(path).name != RESULTS or str(Path(path).parent) not in paths:
            print(f"{stage}: reads {name} from {path}")
    print(f"{stage}: writes {output}", flush=True)


def _drop_rows_after(path: Path, step: int | None) -> None:
    if step is None:
        path.unlink(missing_ok=True)
    elif path.is_file():
        with path.open(encoding="utf-8", newline="\n") as file:  # str.splitlines splits at U+2028
            kept = [line for line in file if _step_of(line) <= step]
        write_text(path, "".join(kept))


def _step_of(line: str) -> float:
    """Return the step of a row; infinity if it has none or its line is cut off.

    Rows without a step are written at the end of a run."""
    try:
        return json.loads(line).get("step", math.inf)
    except json.JSONDecodeError:
        return math.inf
