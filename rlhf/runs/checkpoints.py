"""Resumes a run where it was cut off, to the same bits.

Decides when checkpoints are written, and whether a checkpoint belongs to this run."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from rlhf.runs.checkpoint_files import (
    Manifest,
    check_files,
    check_shard,
    checkpoint_folder,
    finish_checkpoint,
    newest_checkpoint,
    read_manifest,
    read_shard,
    read_states,
    remove_others,
    start_checkpoint,
    write_shard,
)
from rlhf.runs.folder import MAX_SHOWN, contents_of, find_differences
from rlhf.runs.interrupts import Interrupted, interrupts
from rlhf.runs.run import Run
from rlhf.runs.stateful import State, Stateful, StatefulDict
from rlhf.training import sharding
from rlhf.training.processes import gather_from_all, max_over_processes

_PROCESSES = "processes"
"""Name of the part that holds the state of each process by its number, such as its generators."""
_PRECISION = "mixed_precision"
_SPLIT = "split_by"
_WHOLE = "nothing"
"""Value of `split_by` if every process holds the whole model."""


class Checkpoints:
    """Writes and restores the checkpoints of one run. Only the last one is kept.

        checkpoints = Checkpoints(run, accelerator, every)
        checkpoints.restore(parts, own)
        for step in ...:  # the steps after checkpoints.step
            ...
            checkpoints.end_step(step)
        checkpoints.close()

    Make it before the run writes anything. All processes must see the folder. If ZeRO or FSDP2
    splits the model, every process writes and reads its own shards, and none gathers the model.

    Args:
        every: Number of steps between checkpoints. None writes none.
        unit: What the stage calls a step in messages.

    Raises:
        ValueError: The folder holds a checkpoint of another run, or one that is not whole.
    """

    def __init__(
        self, run: Run, accelerator: Accelerator, every: int | None, *, unit: str = "step"
    ) -> None:
        self._run = run
        self._accelerator = accelerator
        self._every = every
        self._unit = unit
        self._num_since = 0
        self._parts, self._own = StatefulDict(), StatefulDict()
        self._split_by = sharding.split_by(accelerator)
        if every is not None and (reason := sharding.why_not_saved(accelerator)):
            self._every = None
            self._print(
                f"no checkpoints are written, and this run cannot be resumed: {reason}, which they "
                "cannot hold"
            )
        self.step: int | None = None
        """The last step that is done; the run resumes after it. None means a new run."""
        self._states: dict[str, State] = {}
        self._own_state: State = {}
        if accelerator.is_main_process:
            self.step, self._states = self._find()
        if accelerator.num_processes > 1:
            (self.step,) = broadcast_object_list([self.step])
        if self.step is not None:
            self._read(checkpoint_folder(run.checkpoints, self.step))

    @property
    def are_written(self) -> bool:
        """Whether this run writes checkpoints."""
        return self._every is not None

    def saved(self, part: str) -> State | None:
        """Return a part's state from the checkpoint that was found; None if there is none."""
        return self._states.get(part)

    def restore(self, parts: Mapping[str, Stateful], own: Mapping[str, Stateful]) -> None:
        """Load the checkpoint that was found, if any, and keep the parts for the next one.

        From this call until `close`, an interrupt waits for the end of a step.

        Args:
            parts: The parts whose state is the same in all processes.
            own: The parts whose state differs between processes, such as generators and shards.
        """
        self._parts, self._own = StatefulDict(parts), StatefulDict(own)
        if self.step is not None:
            self._parts.load_state_dict(self._states)
            self._own.load_state_dict(self._own_state)
        self._states, self._own_state = {}, {}
        interrupts.are_deferred = self.are_written

    def end_step(self, step: int) -> bool:
        """Record that a step is done and logged. Save if it is time, or if a signal came.

        Returns:
            Whether it was saved.

        Raises:
            Interrupted: A signal asked the run to end.
            OSError: The checkpoint could not be written; the previous one is still there.
        """
        if self._every is None:
            return False
        self._num_since += 1
        is_to_end = bool(max_over_processes(self._accelerator, int(interrupts.is_pending)))
        is_time = is_to_end or self._num_since >= self._every
        if is_time:
            self._save(step)
        if is_to_end:
            raise Interrupted(
                f"{self._run.stage}: interrupted after {self._unit} {step}; the same command goes "
                f"on from {checkpoint_folder(self._run.checkpoints, step)}"
            )
        return is_time

    def close(self) -> None:
        """Record that the last step is done. From now on an interrupt ends the program at once.

        An interrupt that was deferred ends it here. The parts are released, since a model among
        them would stay in memory.
        """
        self._parts, self._own = StatefulDict(), StatefulDict()
        interrupts.are_deferred = False
        if interrupts.is_pending:
            raise KeyboardInterrupt

    def _find(self) -> tuple[int | None, dict[str, State]]:
        """Return step and states to resume from, on the first process; None if there are none."""
        folder = newest_checkpoint(self._run.checkpoints)
        if folder is None or self._run.is_finished:
            return None, {}
        manifest = read_manifest(folder)
        if other := self._other_run(manifest):
            if self._run.may_overwrite:
                self._print(f"does not go on from {folder}, which is of another run: {other}")
                return None, {}
            raise ValueError(
                f"{folder} is of another run: {other}; start it as before to go on, or delete "
                f"{folder.parent} (or give --overwrite, or another output_dir) to start anew"
            )
        self._tell_other_code(folder, manifest)
        check_files(folder, manifest)
        states = read_states(folder)
        self._run.resume(manifest.step, manifest.seconds)
        self._print(f"resumes after {self._unit} {manifest.step} from {folder}")
        return manifest.step, states

    def _read(self, folder: Path) -> None:
        """Read the states that `_find` did not read, which include this process's own."""
        rank = self._accelerator.process_index
        if not self._accelerator.is_main_process:
            self._states = read_states(folder)
        if self._split_by is None:
            self._own_state = self._states.pop(_PROCESSES)[str(rank)]
        else:
            gather_from_all(lambda: check_shard(folder, rank), ValueError)
            self._own_state = read_shard(folder, rank)

    def _other_run(self, manifest: Manifest) -> str:
        """Return in words how a checkpoint's run differs from this one; empty if it does not."""
        now, then = self._identity(), manifest.run
        differences = list(islice(_differences(then, now), MAX_SHOWN))
        if differences:
            return "; ".join(differences)
        count = self._accelerator.num_processes
        if manifest.num_processes != count:
            each = "" if self._split_by is None else " and has its shard of the model"
            return (
                f"the number of processes was {manifest.num_processes} and is {count}, and each "
                f"goes on with its own random numbers and its own part of a batch{each}"
            )
        return ""

    def _tell_other_code(self, folder: Path, manifest: Manifest) -> None:
        now, then = self._identity(), manifest.run
        for name in ("commit", "versions"):
            if then[name] != now[name]:
                self._print(
                    f"note: {folder} was written with {name} {then[name]}, and this is "
                    f"{now[name]}; the rest of the run may differ from what it would have been"
                )

    def _identity(self) -> dict[str, Any]:
        split = {} if self._split_by is None else {_SPLIT: self._split_by}
        return {**self._run.identity(), _PRECISION: self._accelerator.mixed_precision, **split}

    def _save(self, step: int) -> None:
        self._run.sync()  # rows first: a checkpoint must not hold a step whose row can be lost
        folder = checkpoint_folder(self._run.checkpoints, step)
        try:
            if self._split_by is None:
                self._write_whole(folder, step)
            else:
                self._write_shards(folder, step)
        except OSError as error:
            raise OSError(f"{error}; {self._fallback()}") from error
        if self._accelerator.is_main_process:
            remove_others(folder)
            self._run.refresh_page()
        self._accelerator.wait_for_everyone()
        self._num_since = 0

    def _write_whole(self, folder: Path, step: int) -> None:
        """Write a model that every process holds whole; only the first process writes."""
        own = gather_object([self._own.state_dict()])
        if self._accelerator.is_main_process:
            start_checkpoint(folder)
            of_processes = {str(rank): state for rank, state in enumerate(own)}
            self._finish(folder, step, {_PROCESSES: of_processes}, {})

    def _write_shards(self, folder: Path, step: int) -> None:
        """Write a model in shards: every process writes its own, then the first one the rest."""
        rank, is_main = self._accelerator.process_index, self._accelerator.is_main_process
        gather_from_all(lambda: start_checkpoint(folder) if is_main else None, OSError)
        written = gather_from_all(
            lambda: write_shard(folder, rank, self._own.state_dict()), OSError
        )
        shards = {name: sha for files in written for name, sha in files.items()}
        gather_from_all(
            lambda: self._finish(folder, step, {}, shards) if is_main else None, OSError
        )

    def _finish(
        self, folder: Path, step: int, more: Mapping[str, State], shards: Mapping[str, str]
    ) -> None:
        finish_checkpoint(
            folder,
            {**self._parts.state_dict(), **more},
            step=step,
            seconds=self._run.seconds,
            num_processes=self._accelerator.num_processes,
            run=self._identity(),
            shards=shards,
        )

    def _fallback(self) -> str:
        folder = newest_checkpoint(self._run.checkpoints)
        where = "from the start" if folder is None else f"from {folder}"
        return f"fix that and give the same command again, which goes on {where}"

    def _print(self, text: str) -> None:
        self._accelerator.print(f"{self._run.stage}: {text}", flush=True)


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield a description of each difference between a checkpoint's run and this one."""
    contents = [{**run, "inputs": contents_of(run["inputs"])} for run in (then, now)]
    yield from find_differences(*contents)
    if then.get(_PRECISION) != now[_PRECISION]:
        yield f"the launcher's {_PRECISION} was {then.get(_PRECISION)} and is {now[_PRECISION]}"
    split_by, splits_now = (run.get(_SPLIT, _WHOLE) for run in (then, now))
    if split_by != splits_now:
        yield f"the model was split by {split_by} and is by {splits_now}"
